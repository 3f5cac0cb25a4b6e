"""Scheduling policies: admit, order, route, limit, predict, and the presets made of them."""
