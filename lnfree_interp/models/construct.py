"""The one place where a `HookedTransformer` is built from a config and a state dict."""

import copy
import warnings
from collections.abc import Mapping

from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import CheckpointError

# Made by the constructor, not stored: attention's causal mask and TransformerLens' zero b_U.
_MAY_BE_MISSING = ("attn.mask", "attn.IGNORE", "unembed.b_U")


def hooked_transformer(
    cfg: HookedTransformerConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
) -> HookedTransformer:
    """A stock `HookedTransformer` with exactly these weights, unprocessed.

    TransformerLens loads with `strict=False`, so a key that does not fit vanishes unnoticed; here
    it is an error.

    Raises:
        CheckpointError: if a weight is missing, unexpected or of another shape.
    """
    if tokenizer is not None:
        # TransformerLens would open it a second time from its name, to make it prepend BOS: from
        # another revision or cache, without tokens added since, or not at all. Told that it
        # prepends BOS already, it takes this one, finds that it does not, and prepends by itself.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    with warnings.catch_warnings():
        # HookedTransformer is what this package is for; its deprecation is known.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer=tokenizer)
    if tokenizer is not None:
        del tokenizer.init_kwargs["add_bos_token"]
    try:
        missing, unexpected = model.load_state_dict(dict(state_dict), strict=False)
    except RuntimeError as error:
        shapes = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(f"weights do not fit the config: {' '.join(shapes)}") from error
    missing = [key for key in missing if not key.endswith(_MAY_BE_MISSING)]
    if missing or unexpected:
        raise CheckpointError(
            f"weights do not fit the config: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()
