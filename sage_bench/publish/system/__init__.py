"""Figures and tables of the system itself: what it is made of, and how its parts work together."""
