"""Opening a checkpoint: a hub id, a folder or a file becomes a model of `transformers`.

Published LN-free formats that transformers does not know are rewritten as one that it can run
(`checkpoints.published`), so that every import can be compared with it. What cannot be opened is
refused with the reason.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lnfree_interp.checkpoints import gguf, published
from lnfree_interp.checkpoints.architectures import architecture_of, config_fields
from lnfree_interp.checkpoints.gguf_header import read_header
from lnfree_interp.checkpoints.hub import (
    TOKENIZER_FILES,
    WEIGHTS_FILES,
    first_line,
    is_gguf,
    locate,
)
from lnfree_interp.checkpoints.pickles import read_pickle, read_state_dict, shards_of
from lnfree_interp.checkpoints.sidecar import read_sidecar
from lnfree_interp.errors import CheckpointError, LnfreeError, UnsupportedModelError
from lnfree_interp.models.agreement import record_origin

# Causal masks that old versions of transformers stored with the weights.
_MASK = re.compile(r"\.attn(\.attention)?\.(bias|masked_bias)$")

Sigma = Mapping[str, float | Tensor]


@dataclass
class OpenCheckpoint:
    """A checkpoint as a `transformers` model, and what else its files say."""

    hf_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    format: str
    """What it was recognised as, in words; a published LN-free format begins with "LN-free"."""
    sigma: dict[str, float] | None = None
    """The constants of its norms by TransformerLens' names, where the format states them."""
    epsilon: float | None = None
    """What its norms added to the variance while they were live; None if that is not known."""
    origin: str | None = None
    """How the weights lost precision before they came here; None if that is not known."""

    def take_weights(self) -> dict[str, Tensor]:
        """The weights. The model is dropped, so that each weight can be freed once it is used."""
        state = dict(self.hf_model.state_dict())
        del self.hf_model
        return state


def open_in_transformers(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    sigma: Sigma | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and tokenizer of a hub id, a local folder or file, in `transformers`.

    No code from the checkpoint is run: safetensors, or pickles restricted to tensors.

    Args:
        source: Hub id such as `gpt2`, a folder, a `model.gguf`, or a nanoGPT `ckpt.pt`.
        dtype: Of the weights in memory, whatever the file holds.
        device: Where the weights go.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept. Default: that of `huggingface_hub`.
        sigma: The constants of a nanoGPT file, see `load`.

    Returns:
        The model, and its tokenizer or None.

    Raises:
        CheckpointError: if something is missing, unreadable or unreachable.
        UnsupportedModelError: if the architecture is not supported; found before any weight is
            read.
        NormSiteError: for a sigma that does not fit the nanoGPT file.

    Examples:
        >>> hf_model, tokenizer = lf.formats.open_in_transformers(lf.bundled_checkpoint())
        >>> type(hf_model).__name__
        'GPT2LMHeadModel'
    """
    folder = locate(source, revision, cache_dir)
    opened = open_checkpoint(folder, os.fspath(source), dtype=dtype, device=device, sigma=sigma)
    return opened.hf_model, opened.tokenizer


def open_checkpoint(
    path: Path,
    name: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    sigma: Sigma | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> OpenCheckpoint:
    """The checkpoint at a local path as a `transformers` model.

    Args:
        path: As `locate` returns it.
        name: The name that the user gave, for messages.
        dtype: Of the weights in memory.
        device: Where they go.
        sigma: Constants of the norms, for a format that does not state them.
        tokenizer: Used in place of the checkpoint's own, which may then be missing.

    Raises:
        CheckpointError: if something is missing or unreadable.
        UnsupportedModelError: if the architecture is not supported.
    """
    if path.is_file() and not is_gguf(path):
        opened = _open_nanogpt(path, dtype, sigma)
        opened.tokenizer = tokenizer
    elif sigma is not None:
        raise CheckpointError(
            f"{name}: sigma is for nanoGPT files, and this checkpoint holds its own constants: "
            "leave sigma out"
        )
    elif path.is_file():
        opened = _open_gguf(path, dtype, tokenizer)
    else:
        _require_files(path, tokenizer_needed=tokenizer is None)
        config = read_config(path, name)
        tokenizer = tokenizer or read_tokenizer(path)
        safetensors = WEIGHTS_FILES[0]
        if (path / safetensors).is_file() or (path / f"{safetensors}.index.json").is_file():
            _require_plausible_size(path, config, _count_weights(path))
            hf_model = _in_transformers(path, config, dtype, pretrained_model_name_or_path=path)
            sidecar = read_sidecar(path)
            opened = OpenCheckpoint(hf_model, tokenizer, "safetensors")
            if sidecar is not None:
                opened.sigma, opened.epsilon = dict(sidecar.sigma), sidecar.epsilon
                opened.origin = sidecar.weights
        else:
            opened = _from_pickles(path, config, dtype)
            opened.tokenizer = tokenizer
    nn.Module.to(opened.hf_model, device).eval()
    _release_file(opened.hf_model)
    record_origin(opened.hf_model, opened.origin)
    return opened


def _release_file(model: PreTrainedModel) -> None:
    """Copy weights that are views of a mapped file, so that each can be freed by itself."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def read_config(path: Path, name: str) -> PretrainedConfig:
    """The config of a folder or a GGUF file, of a supported architecture that can be represented
    faithfully.

    Raises:
        CheckpointError: if it cannot be read or contradicts itself.
        UnsupportedModelError: if the architecture, or this variant of it, is not supported.
    """
    if is_gguf(path):
        with gguf.alone(path) as where:
            return gguf.read_config(read_header(path), where)
    folder = path
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers validates with types of its own
        raise CheckpointError(f"{name}: config.json cannot be read: {first_line(error)}") from error
    _, architecture = architecture_of(config)
    config_fields(config, architecture)
    return config


def read_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub id or a GGUF file.

    Raises:
        CheckpointError: if there is none that can be used.
    """
    path = Path(source)
    try:
        if not (path.is_file() and is_gguf(path)):
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        read_header(path)
        with gguf.alone(path) as where:
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = ""
        return tokenizer
    except LnfreeError:
        raise
    except Exception as error:  # the tokenizer libraries raise their own types
        raise CheckpointError(f"{source}: no usable tokenizer: {first_line(error)}") from error


def _open_gguf(
    file: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None
) -> OpenCheckpoint:
    header = read_header(file)
    if tokenizer is None and not header.has_tokenizer:
        raise CheckpointError(
            f"{file}: no tokenizer in it: pass tokenizer=, such as "
            "AutoTokenizer.from_pretrained(ORIGINAL) (on the command line: --tokenizer ORIGINAL)"
        )
    with gguf.alone(file) as where:
        config = gguf.read_config(header, where)
        _require_plausible_size(file, config, header.numbers, says="its metadata")
        gguf.require_places(header, config)
        tokenizer = tokenizer or read_tokenizer(file)
        hf_model = _in_transformers(file, config, dtype, says="its metadata", **where)
    kind = header.describe(dtype)
    origin = None if header.quantisation is None else kind
    return OpenCheckpoint(gguf.as_plain(hf_model), tokenizer, kind, origin=origin)


def _from_pickles(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> OpenCheckpoint:
    source = f"{folder}/pytorch_model.bin"
    state = read_state_dict(folder)
    _require_plausible_size(folder, config, sum(map(_stored, state.values())))
    adapted = published.merge_lora(state, source)
    constants = published.take_fake_layer_norms(state, source)
    kind = "pytorch_model.bin"
    sigma, epsilon = None, None
    if constants is not None:
        if config.model_type != "gpt2":
            raise UnsupportedModelError(
                f"{source}: FakeLayerNorms in a model of type {config.model_type!r}: only GPT-2 "
                "checkpoints with them are supported"
            )
        epsilon = config.layer_norm_epsilon
        kind = "LN-free, FakeLayerNorm checkpoint"
        published.refuse_float16(dtype, source)
        published.move_constants_into_gains(
            state, constants, max(dtype, torch.float32, key=_precision)
        )
        config.layer_norm_epsilon = published.CONSTANT_EPSILON
        names = published.hf_norms(cast(GPT2Config, config)).items()
        sigma = {ours: constants[theirs] for ours, theirs in names if theirs in constants}
    if adapted:
        kind += " with LoRA adapters merged"
    hf_model = _from_state(folder, config, state, dtype)
    return OpenCheckpoint(hf_model, None, kind, sigma, epsilon)


def _open_nanogpt(file: Path, dtype: torch.dtype, sigma: Sigma | None) -> OpenCheckpoint:
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a nanoGPT checkpoint: it holds no dictionary")
    config, state = published.read_nanogpt(content, str(file))
    _require_plausible_size(file, config, sum(map(_stored, state.values())))
    if sigma is None:
        raise CheckpointError(
            f"{file}: a nanoGPT checkpoint does not store the constants of its norms. Pass sigma="
            "lf.formats.nanogpt_sigma(std_dict, std_bos_dict, d_model), with its run's tables, or "
            "sigma={} if its LayerNorms are live (on the command line: --sigma FILE.json)"
        )
    kind, shown = "nanoGPT checkpoint with live norms", None
    if sigma:
        kind = "LN-free, nanoGPT checkpoint with the constants given"
        published.refuse_float16(dtype, str(file))
        constants = published.sigma_by_hf_norm(sigma, config, str(file))
        published.move_constants_into_gains(
            state, constants, max(dtype, torch.float32, key=_precision)
        )
        config.layer_norm_epsilon = published.CONSTANT_EPSILON
        shown = {ours: published.typical_sigma(value) for ours, value in sigma.items()}
    return OpenCheckpoint(_from_state(file, config, state, dtype), None, kind, shown)


def _precision(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


def _from_state(
    source: Path, config: PretrainedConfig, state: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    return _in_transformers(
        source, config, dtype, pretrained_model_name_or_path=None, state_dict=state
    )


def _in_transformers(
    source: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    says: str = "config.json",
    **where: Any,
) -> PreTrainedModel:
    """`from_pretrained` with every weight accounted for."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        model, report = model_class.from_pretrained(
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **where,
        )
    except Exception as error:  # safetensors raises its own types
        raise CheckpointError(f"{source}: weights cannot be loaded: {first_line(error)}") from error
    if wrong := sorted(report["mismatched_keys"], key=str):
        name, found, expected = wrong[0]
        raise CheckpointError(
            f"{source}: {name} has shape {list(found)}, {says} says {list(expected)}"
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{source}: the weights file lacks {', '.join(missing[:3])}")
    if unknown := [key for key in sorted(report["unexpected_keys"]) if not _MASK.search(key)]:
        raise CheckpointError(
            f"{source}: the weights file holds {', '.join(unknown[:3])}, which has no place in the "
            f"model of {says}"
        )
    return model


def _require_files(folder: Path, tokenizer_needed: bool) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json, so this is not a Hugging Face checkpoint folder"
        )
    indices = [folder / f"{name}.index.json" for name in WEIGHTS_FILES]
    if not any((folder / name).is_file() for name in WEIGHTS_FILES) and not any(
        index.is_file() for index in indices
    ):
        raise CheckpointError(f"{folder}: no model.safetensors and no pytorch_model.bin")
    for index in indices:
        if index.is_file():
            shards_of(index)
    if tokenizer_needed and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder}: no tokenizer (tokenizer.json): pass tokenizer=, or save it there with "
            "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
        )


def has_tokenizer(source: str | os.PathLike[str], revision: str | None = None) -> bool:
    """Whether a checkpoint brings a tokenizer.

    Raises:
        CheckpointError: if the checkpoint is neither local nor on the hub, or the hub cannot be
            reached.
    """
    folder = locate(source, revision)
    if is_gguf(folder):
        return read_header(folder).has_tokenizer
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def weight_shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            return {name: weights.get_slice(name).get_shape() for name in names}
    except Exception as error:  # safetensors raises its own types
        raise CheckpointError(
            f"{file}: weights cannot be loaded: damaged or truncated ({first_line(error)})"
        ) from error


def _count_weights(folder: Path) -> int:
    """How many numbers the safetensors of a folder hold."""
    files = sorted(folder.glob("*.safetensors"))
    shapes = (shape for file in files for shape in weight_shapes(file).values())
    return sum(torch.Size(shape).numel() for shape in shapes)


def _stored(W: Tensor) -> int:
    """How many numbers a tensor stores; an expanded tensor stores fewer than it shows."""
    return min(W.numel(), W.untyped_storage().nbytes() // W.element_size())


def _require_plausible_size(
    source: Path, config: PretrainedConfig, stored: int, says: str = "config.json"
) -> None:
    """Refuse a config that describes a larger model than the files hold, before it is built."""
    fields = config_fields(config, architecture_of(config)[1])
    d_model, d_mlp = fields["d_model"], fields["d_mlp"]
    attention = 2 * d_model * fields["d_head"] * fields["n_heads"]  # W_Q and W_O
    needed = fields["d_vocab"] * d_model + fields["n_layers"] * (attention + 2 * d_model * d_mlp)
    if fields.get("positional_embedding_type") != "rotary":
        needed += fields["n_ctx"] * d_model
    if needed > stored:
        raise CheckpointError(
            f"{source}: {says} describes at least {needed:,} weights, the files hold "
            f"{stored:,}: they do not belong together"
        )
