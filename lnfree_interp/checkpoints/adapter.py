"""A fine-tuned model as what training changed: a small folder that `load` puts back.

`lnfree_adapter.json` names the base, and has the constants of frozen norms and a few logits by
which a wrong base is noticed; `adapter.safetensors` has each tensor that differs from the base's:
whole, or its changed entries (`NAME|index` in the flattened tensor, and `NAME|values`) where these
are less than half of it.

One folder can hold several banks over one base, each with all that norms learn (`tuning.banks`).
Their tensors are `BANK/NAME`, in place of what the rest of the folder says of NAME.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.checkpoints import native
from lnfree_interp.checkpoints.hub import ADAPTER, ADAPTER_WEIGHTS, first_line
from lnfree_interp.checkpoints.layouts import is_finite
from lnfree_interp.errors import (
    CheckpointError,
    DataError,
    NormSiteError,
    UnsupportedModelError,
)
from lnfree_interp.models.inserting import layout_of
from lnfree_interp.models.running import require_tokens
from lnfree_interp.models.sites import (
    freeze_site,
    get_norm,
    has_norm_sites,
    has_tied_unembedding,
    list_norm_sites,
    split_norms,
    stock_weights,
    untie,
)
from lnfree_interp.numerics import TOLERANCE, MeasuredError

_VERSION = 1

BASE = "base"
"""What stands for the model below all banks, where a bank is named."""
KEY = "key"
"""The name of a bank's key among its tensors: no parameter of the model."""


def is_adapter(path: Path) -> bool:
    """Whether a folder was written by `write`."""
    return (path / ADAPTER).is_file()


def write(
    model: HookedTransformer,
    base_model: HookedTransformer,
    base: str,
    revision: str | None,
    base_form: str | None,
    folder: Path,
    banks: Mapping[str, Mapping[str, Tensor]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write what differs from a base into an existing folder.

    Args:
        model: With live norms, or with norm sites.
        base_model: The base, as `load` gives it, in the model's dtype.
        base: Where it is.
        revision: Its revision on the hub.
        base_form: The form in which it is loaded.
        folder: The folder to write into.
        banks: Tensors of each bank, by name.
        about: What else the folder says.

    Raises:
        UnsupportedModelError: if the model is not the base, trained.
        NormSiteError: if a norm site is between live and frozen.
    """
    sited = has_norm_sites(model)
    like = split_norms(base_model, copy_weights=False) if sited else base_model
    after, before = stock_weights(model), stock_weights(like)
    if (sited and layout_of(model) != layout_of(like)) or {
        n: W.shape for n, W in after.items()
    } != {n: W.shape for n, W in before.items()}:
        raise UnsupportedModelError(
            f"an adapter holds what training changed, and this model has other norms or other "
            f"tensors than {base}: give `run.model` as the run left it, and what it was trained "
            "from as the base; fold it after loading"
        )
    tied = has_tied_unembedding(model)
    if tied:
        del after["unembed.W_U"]
    tensors: dict[str, Tensor] = {}
    for name, W in after.items():
        changed = (before[name] != W).flatten().nonzero()[:, 0]
        if 0 < len(changed) < W.numel() / 2:
            few = W.numel() < 2**31
            tensors[f"{name}|index"] = changed.cpu().to(torch.int32 if few else torch.int64)
            tensors[f"{name}|values"] = W.flatten()[changed].cpu()
        elif len(changed):
            tensors[name] = W.contiguous().cpu()
    for bank, own in (banks or {}).items():
        tensors |= {f"{bank}/{name}": W.contiguous().cpu() for name, W in own.items()}
    content = {
        "version": _VERSION,
        "base": base,
        "revision": revision,
        "base_form": base_form,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "sites": sited,
        "tied": tied,
        **native.constants_of(model),
        **native.sample_of(model),
        **(about or {}),
    }
    (folder / ADAPTER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@dataclass(frozen=True)
class Adapter:
    """What a folder says."""

    folder: Path
    base: str
    """The checkpoint that it changes."""
    revision: str | None
    content: dict[str, Any]
    sample: dict[str, Tensor]
    """Tokens and logits to recognise the model by."""
    dtype: torch.dtype
    """That of the model when it was written."""
    banks: Mapping[str, Mapping[str, Tensor]]
    """By name of a bank, tokens and logits to recognise the model with it by; none in an adapter
    without banks."""
    bank: str | None = None
    """The bank that is put back, if any."""

    def of_bank(self, bank: str | None) -> "Adapter":
        """The same with one of its banks.

        Raises:
            CheckpointError: if there is no such bank, or one has to be named.
        """
        if not self.banks:
            if bank is None:
                return self
            raise CheckpointError(
                f"{self.folder}: an adapter without banks, so leave out bank={bank!r}; banks are "
                "written by lf.NormBanks.save"
            )
        if bank == BASE:
            return self
        holds = f"it holds {', '.join(self.banks)}, and {BASE}, the model below them"
        if bank is None:
            raise CheckpointError(f"{self.folder}: a folder of banks, so give bank=...: {holds}")
        if bank not in self.banks:
            near = difflib.get_close_matches(bank, self.banks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(f"{self.folder}: no bank {bank!r}: {holds}{hint}")
        return replace(self, bank=bank, sample=dict(self.banks[bank]))

    def tensors(self) -> dict[str, Tensor]:
        """What differs from the base, by name, and `BANK/NAME`.

        Raises:
            CheckpointError: if the file is missing or damaged.
        """
        file = self.folder / ADAPTER_WEIGHTS
        try:
            return load_file(file)
        except Exception as error:  # safetensors raises many types
            raise CheckpointError(f"{file}: cannot be read: {first_line(error):.100}") from error

    def put_back(
        self, base: HookedTransformer, check: bool
    ) -> tuple[HookedTransformer, MeasuredError | None]:
        """The model that was written.

        Args:
            base: The base; its weights are changed.
            check: Compare the logits with the stored ones.

        Raises:
            CheckpointError: if the weights are missing, damaged, or of another model.
            InexactError: if the logits are not those of the model that was written.
        """
        file = self.folder / ADAPTER_WEIGHTS
        found = self.tensors()
        tensors = {name: W for name, W in found.items() if "/" not in name}
        if self.bank is not None:
            own = tensors_of_bank(found, self.bank)
            tensors = {n: W for n, W in tensors.items() if n.partition("|")[0] not in own} | own
            tensors.pop(KEY, None)
        model = base
        if self.content["sites"]:
            model = split_norms(base, copy_weights=False)
            if not self.content["tied"]:
                untie(model)
        places = stock_weights(model)
        for key, W in tensors.items():
            name, _, part = key.partition("|")
            if part == "index":
                continue
            place, index = places.get(name), tensors.get(f"{name}|index")
            whole = (part == "") == (index is None)  # both halves of what is in part
            if place is None or not whole or not _fits(W, index, place):
                raise CheckpointError(f"{file}: {name} does not fit {self.base}")
            if not is_finite(W):
                raise CheckpointError(f"{file}: {name} holds values that are not finite")
            if index is not None:
                flat = place.flatten()
                flat[index.long().to(flat.device)] = W.to(flat)
                W = flat.view_as(place)
            place.copy_(W)
        if self.content["tied"] and not self.content["sites"]:
            places["unembed.W_U"].copy_(places["embed.W_E"].T)
        self._freeze(model)
        model = model.eval()
        return model, self.require_sample(model) if check else None

    def require_sample(self, model: HookedTransformer) -> MeasuredError:
        """Compare a model's logits with the stored ones.

        Raises:
            CheckpointError: if it cannot read the stored tokens.
            InexactError: if the logits are not those of the model that was written.
        """
        try:
            require_tokens(model, self.sample["tokens"])
        except DataError as error:
            raise CheckpointError(f"{self.folder / ADAPTER}: {error}") from error
        what = "an adapter" if self.bank is None else f"bank {self.bank}"
        where = f"{self.folder}, {what} of {self.base}"
        return native.require_sample(model, self.sample, self.dtype, where)

    def _freeze(self, model: HookedTransformer) -> None:
        """Freeze the sites that were frozen, and no others."""
        frozen, first = self.content["frozen"], self.content["frozen_first"]
        try:
            for site in list_norm_sites(model) if has_norm_sites(model) else ():
                if str(site) not in frozen and get_norm(model, site).frozen:
                    get_norm(model, site).thaw()
            for site, sigma in frozen.items():
                freeze_site(model, site, sigma, first=first.get(site))
        except NormSiteError as error:
            raise CheckpointError(f"{self.folder / ADAPTER}: {error}") from error


def tensors_of_bank(tensors: Mapping[str, Tensor], bank: str) -> dict[str, Tensor]:
    """A bank's own tensors, by their names in the model, and its key."""
    prefix = f"{bank}/"
    return {name.removeprefix(prefix): W for name, W in tensors.items() if name.startswith(prefix)}


def _fits(W: Tensor, index: Tensor | None, place: Tensor) -> bool:
    """Whether a tensor, or entries at some places of one, can stand in a parameter."""
    if index is None:
        return W.shape == place.shape
    if index.dtype not in (torch.int32, torch.int64):
        return False
    return W.shape == index.shape and bool(((index >= 0) & (index < place.numel())).all())


def unwound(
    source: str, revision: str | None, locate: Callable[[str, str | None], Path], base: str | None
) -> tuple[list[Adapter], str, str | None, Path]:
    """The adapters between a source and the whole model below them, the source's own first.

    Args:
        source: Where the first one is.
        revision: Its revision on the hub.
        locate: The folder of a source and its revision.
        base: What is used in place of the first one's base.

    Returns:
        The adapters, none if the source is a whole model; that model's name, revision and path.

    Raises:
        CheckpointError: if adapters go in a circle.
    """
    found: list[Adapter] = []
    seen: set[Path] = set()
    while is_adapter(path := locate(source, revision)):
        if path.resolve() in seen:
            raise CheckpointError(f"{path}: this adapter is the base of itself")
        seen.add(path.resolve())
        one = read(path)
        if base is not None and not found:
            one = replace(one, base=base, revision=None)
        found.append(one)
        source, revision = one.base, one.revision
    return found, source, revision, path


def read(folder: Path) -> Adapter:
    """What an adapter's folder says, without its weights.

    Raises:
        CheckpointError: if it cannot be read.
    """
    file = folder / ADAPTER
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise CheckpointError(
                f"{file}: version {content['version']}; this package reads version {_VERSION}"
            )
        for name in ("frozen", "frozen_first"):
            content[name] = {site: float(sigma) for site, sigma in content[name].items()}
        content |= {name: bool(content[name]) for name in ("sites", "tied")}
        sample = native.read_sample(content)
        banks = {
            str(name): native.read_sample(one) for name, one in content.get("banks", {}).items()
        }
        for name, kinds in (("base", str), ("revision", str | None), ("base_form", str | None)):
            if not isinstance(content[name], kinds):
                raise CheckpointError(f"{file}: {name} is {content[name]!r:.60}, not text")
        dtype = {str(one).removeprefix("torch."): one for one in TOLERANCE}[content["dtype"]]
    except CheckpointError:
        raise
    except Exception as error:  # whatever a wrong value leads to
        raise CheckpointError(f"{file}: cannot be read: {first_line(error):.100}") from error
    return Adapter(folder, content["base"], content["revision"], content, sample, dtype, banks)
