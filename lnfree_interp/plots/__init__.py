"""Figures: each takes a result object and returns a plotly figure; `circuits` has live views."""

from lnfree_interp.plots import circuits
from lnfree_interp.plots.attention import pattern, scores
from lnfree_interp.plots.attribution import attribution
from lnfree_interp.plots.banks import norm_banks
from lnfree_interp.plots.component_change import component_change
from lnfree_interp.plots.deletions import deletions
from lnfree_interp.plots.depth import angles, depth, spectrum
from lnfree_interp.plots.direct_effects import direct_effects
from lnfree_interp.plots.evaluation import loss_by_position, residual_norms
from lnfree_interp.plots.fisher import fisher_information
from lnfree_interp.plots.flow import flow, paths
from lnfree_interp.plots.gradients import gradient_balance
from lnfree_interp.plots.lens import lens
from lnfree_interp.plots.probes import probes
from lnfree_interp.plots.sensitivity import site_sensitivity
from lnfree_interp.plots.static import save, show_in_notebooks
from lnfree_interp.plots.training import sigma_drift, training_curve

__all__ = [
    "angles",
    "attribution",
    "circuits",
    "component_change",
    "deletions",
    "depth",
    "direct_effects",
    "fisher_information",
    "flow",
    "gradient_balance",
    "lens",
    "loss_by_position",
    "norm_banks",
    "paths",
    "pattern",
    "probes",
    "residual_norms",
    "save",
    "scores",
    "show_in_notebooks",
    "sigma_drift",
    "site_sensitivity",
    "spectrum",
    "training_curve",
]
