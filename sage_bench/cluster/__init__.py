"""Cluster files: read, planned, priced, and made into the devices of a simulation."""
