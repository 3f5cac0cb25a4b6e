"""How the shipped profiles are made: step times from public measurements, fits, held-out errors, bounds, YAML.

Order of reading: ``architecture`` (what a model costs at least), ``kernels`` (measured kernels and their sum over a
step), ``steps`` (the table every source is turned into), ``fit`` (coefficients and their errors), ``assembly`` (a model
on its devices, fitted), ``recipes`` (which profile comes from which source) and ``checks`` (comparison with
measurements the fit has not seen).
"""
