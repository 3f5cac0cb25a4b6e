"""Loads: where requests come from. Each is built by Hydra from ``conf/load`` and follows ``sage_core.load.Load``."""

from sage_bench.loads.arrivals import Bulk, Constant, Gamma, Modulated, OnOff, Periodic, Poisson, Sinusoid
from sage_bench.loads.clients import Clients
from sage_bench.loads.closed_loop import ClosedLoop, ConstantThink, ExponentialThink
from sage_bench.loads.fits import fitted_arrivals, fitted_lengths
from sage_bench.loads.lengths import Empirical, Fixed, Lognormal, LognormalMixture, Uniform
from sage_bench.loads.open_loop import OpenLoop
from sage_bench.loads.request_class import RequestClass
from sage_bench.loads.trace_arrivals import TraceArrivals
from sage_bench.loads.trace_load import TraceLoad

__all__ = [
    "Bulk",
    "Clients",
    "ClosedLoop",
    "Constant",
    "ConstantThink",
    "Empirical",
    "ExponentialThink",
    "Fixed",
    "Gamma",
    "Lognormal",
    "LognormalMixture",
    "Modulated",
    "OnOff",
    "OpenLoop",
    "Periodic",
    "Poisson",
    "RequestClass",
    "Sinusoid",
    "TraceArrivals",
    "TraceLoad",
    "Uniform",
    "fitted_arrivals",
    "fitted_lengths",
]
