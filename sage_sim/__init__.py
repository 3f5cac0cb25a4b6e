"""Simulation: the SimPy driver, simulated devices and their calibrated profiles."""
