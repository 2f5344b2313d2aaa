"""Converting a checkpoint: load, change the norms, export. `lnfree convert` calls this."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from lnfree_interp.checkpoints.exporting import Target, best_target, export, form_of
from lnfree_interp.checkpoints.loading import Loaded, load_checkpoint
from lnfree_interp.checkpoints.source import Sigma
from lnfree_interp.errors import CheckpointError, NormSiteError, UnsupportedModelError
from lnfree_interp.files import require_writable
from lnfree_interp.models.folding import Form
from lnfree_interp.models.inserting import varied
from lnfree_interp.models.sites import list_norm_sites
from lnfree_interp.numerics import MeasuredError
from lnfree_interp.variants.rms import Basis, to_crms, to_rms

NormKind = Literal["rms", "crms"]


@dataclass(frozen=True)
class Plan:
    """What a conversion does; a dry run returns it without doing it."""

    source: str
    recognised: str
    """What the source was recognised as."""
    model: str
    """Architecture and sizes."""
    norms: str
    """The norms of the source, in words."""
    steps: tuple[str, ...]
    target: Target
    """The layout to write: `"transformers"` or `"transformer_lens"`."""
    errors: Mapping[str, MeasuredError]
    """Measured while loading, and while converting unless it was a dry run."""

    def __str__(self) -> str:
        rows = [
            ("source", self.source),
            ("recognised as", self.recognised),
            ("model", self.model),
            ("norms", self.norms),
            *((f"step {i}", step) for i, step in enumerate(self.steps, 1)),
        ]
        return "\n".join(f"{name:14} {value}" for name, value in rows)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: Form | None = None,
    to_norm: NormKind | None = None,
    basis: Basis = "orthonormal",
    target: Target | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sigma: Sigma | None = None,
    check: bool = True,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Load a checkpoint, change its norms, write it as another.

    Args:
        source: Hub id, local folder, `model.gguf` or nanoGPT `ckpt.pt`.
        out: A folder that does not exist yet or is empty.
        form: For LN-free checkpoints: whether the constants are folded into the weights (the
            default) or stay in the norms.
        to_norm: Convert live LayerNorms to RMSNorms or CRMSNorms, exactly.
        basis: Of `to_norm="crms"`: `"orthonormal"` or `"drop"`, see `to_crms`.
        target: `"transformers"` or `"transformer_lens"`, see `export`. Default: a folder for plain
            transformers where it has a class for the result, else TransformerLens' layout.
        dtype: Of the weights.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept.
        tokenizer: In place of the checkpoint's own; it is written into the folder.
        sigma: The constants of a nanoGPT file, see `load`.
        check: Compare the logits with those of transformers after loading.
        dry_run: Load and say what would be done, but do not do it.
        say: Called with a line of text before and after each step.

    Returns:
        A `Plan` of what was done, or would be, and the errors measured on the way.

    Raises:
        NormSiteError: if the options contradict each other or the model.
        UnsupportedModelError: if the target cannot hold the result; and as `load`, `to_rms` and
            `to_crms`.
        OutputError: if the folder holds something, or cannot be written.
        CheckpointError: if the source is missing, incomplete, broken or unreachable.
        InexactError: if the logits after a step differ by more than rounding explains.

    Examples:
        >>> plan = lf.convert(lf.bundled_checkpoint(), "rms", to_norm="rms", dry_run=True)
        >>> plan.norms
        'LayerNorm, live, at 13 sites'
    """
    require_writable(out)
    if form is not None and to_norm is not None:
        raise NormSiteError(
            f"form={form!r} and to_norm={to_norm!r} exclude each other: form is for LN-free "
            "models, to_norm for models with live norms"
        )
    if basis != "orthonormal" and to_norm != "crms":
        raise NormSiteError(f"basis={basis!r} is for to_norm='crms': leave it out, or give both")
    name = os.fspath(source)
    loaded = load_checkpoint(
        source,
        form=form,
        dtype=dtype,
        revision=revision,
        cache_dir=cache_dir,
        tokenizer=tokenizer,
        sigma=sigma,
        check=check,
    )
    plan = _plan(name, Path(out), loaded, to_norm, basis, target)
    say(str(plan))
    for what, error in plan.errors.items():
        say(f"loaded; largest logit difference, {what}: {error}")
    if dry_run:
        return plan
    model, errors = loaded.model, dict(plan.errors)
    if to_norm is not None:
        conversion = to_rms(model) if to_norm == "rms" else to_crms(model, basis)
        errors[f"{to_norm.upper()}Norm against the original"] = conversion.error
        model = conversion.model
        say(f"converted; largest logit difference from before: {conversion.error}")
    export(model, out, target=plan.target, errors=errors, source=name)
    say(f"wrote {os.fspath(out)}")
    return replace(plan, errors=errors)


def _plan(
    source: str,
    out: Path,
    loaded: Loaded,
    to_norm: NormKind | None,
    basis: Basis,
    target: Target | None,
) -> Plan:
    model, cfg = loaded.model, loaded.model.cfg
    kind, sites = form_of(model), list_norm_sites(model)
    if kind == "live":
        norms = f"{'RMSNorm' if cfg.normalization_type == 'RMS' else 'LayerNorm'}, live, at "
        norms += f"{len(sites)} sites"
        norms += f"; {other}" if (other := varied(model)) else ""
    else:
        norms = {
            "folded": "none: constants folded into the weights",
            "frozen": f"constants at {len(sites)} norms",
        }.get(kind, cfg.normalization_type or "none")
    steps = []
    if to_norm is not None:
        if kind not in ("live", "rms"):
            raise NormSiteError(
                f"{source}: to_norm={to_norm!r} needs live norms, and its norms are {norms}"
            )
        if other := varied(model):
            raise UnsupportedModelError(
                f"{source}: {other}; only the norms of a stock model can be converted"
            )
        if kind == "rms" and to_norm == "rms":
            raise NormSiteError(
                f"{source}: its norms are RMSNorms already: leave to_norm out, or pass 'crms'"
            )
        if kind == "live":
            if cfg.normalization_type != "LN":
                raise UnsupportedModelError(
                    f"{source}: only LayerNorm can be converted; its norms are {norms}"
                )
            steps.append("LayerNorm -> RMSNorm: fold gains and biases, centre the writers")
        if to_norm == "crms":
            steps.append(
                f"RMSNorm -> CRMSNorm ({basis}): residual stream {cfg.d_model} -> "
                f"{cfg.d_model - 1} dimensions"
            )
    if to_norm is not None and target == "transformers":
        raise UnsupportedModelError(
            "transformers has no class for the result: leave target out, or pass "
            "target='transformer_lens'"
        )
    where = target or ("transformer_lens" if to_norm else best_target(model))
    what = {
        "transformers": f"{cfg.original_architecture} for plain transformers",
        "transformer_lens": "TransformerLens' own layout (lnfree_interp.load reads it)",
    }[where]
    steps.append(f"write {out} as {what}: safetensors, config, tokenizer, model card, lnfree.json")
    size = (
        f"{cfg.original_architecture}, {cfg.n_layers} layers, d_model {cfg.d_model}, "
        f"{cfg.n_heads} heads, {sum(W.numel() for W in model.parameters()):,} parameters"
    )
    errors = {}
    if loaded.error is not None:
        errors["HookedTransformer against its source"] = loaded.error
    return Plan(source, loaded.format, size, norms, tuple(steps), where, errors)


def read_sigma(file: Path) -> dict[str, float | torch.Tensor]:
    """Constants of norms from a JSON file: a number or a list of d_model numbers for each norm.

    Raises:
        CheckpointError: if the file is not that.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: float(value) if isinstance(value, int | float) else torch.tensor(value).double()
            for name, value in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{file}: not a JSON object of constants: {error!s:.80}") from error
