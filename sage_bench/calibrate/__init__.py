"""From a live engine to a profile of it: requests by design, a fit, and its error on loads that the fit has not seen."""
