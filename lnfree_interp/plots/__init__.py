"""Figures: each takes a result object and returns a plotly figure."""

from lnfree_interp.plots.attribution import attribution
from lnfree_interp.plots.direct_effects import direct_effects
from lnfree_interp.plots.training import training_curve

__all__ = ["attribution", "direct_effects", "training_curve"]
