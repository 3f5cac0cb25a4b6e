"""The sans-I/O core: words, native operators, and the control plane. No clock, no sockets, no threads, no randomness."""
