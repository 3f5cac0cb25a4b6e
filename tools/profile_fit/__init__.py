"""How the shipped profiles are made: iteration times from public measurements, fits, held-out errors, bounds, YAML.

Order of reading: ``architecture`` (what a model costs at least), ``steps`` (the tables every source is turned into),
``kernels`` (measured kernels and their sum over the layers), ``fit`` (times at knots and their errors), ``assembly`` (a model
on its devices, fitted), ``recipes`` (which profile comes from which source) and ``checks`` (comparison with
measurements the fit has not seen).
"""
