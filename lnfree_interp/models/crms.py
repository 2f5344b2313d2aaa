"""Models whose norms are CRMSNorms: a stream that leaves out its last channel."""

import math

from transformer_lens import HookedTransformer

from lnfree_interp.models.norms import CRMSNormPre
from lnfree_interp.models.sites import sites_of


def install_crms(model: HookedTransformer) -> None:
    """Put a `CRMSNormPre` of width d_model + 1 in the place of every norm.

    Epsilon stays in the norms and becomes NaN in the config, as in the frozen form: a model that
    somebody builds from this config alone has other norms, and must not look right.
    """
    cfg = model.cfg
    for site in sites_of(cfg, whole_ln1=True):
        model.set_submodule(str(site), CRMSNormPre(cfg.d_model + 1, cfg.eps))
    cfg.eps = math.nan
    model.setup()


def is_crms(model: HookedTransformer) -> bool:
    """Whether the norms are `CRMSNormPre`: `to_crms` with basis "drop" made the model."""
    return isinstance(getattr(model, "ln_final", None), CRMSNormPre)
