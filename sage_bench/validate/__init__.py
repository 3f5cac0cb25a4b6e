"""A measured run replayed through the simulator, and how far the two are apart."""
