"""Composition root: command line, Hydra app, loads, metrics, figures and reports."""
