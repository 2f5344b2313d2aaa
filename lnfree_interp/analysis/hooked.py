"""`HookedTransformer` of TransformerLens 3.9 as a view: stock, with norm sites, frozen, folded."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from lnfree_interp.analysis.stream import First, Read, Stream
from lnfree_interp.analysis.sublayers import MLP, Attention
from lnfree_interp.analysis.view import View, noting
from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.models.first_token import telling
from lnfree_interp.models.folding import WITHIN, fold_weights
from lnfree_interp.models.norm_map import NormMap
from lnfree_interp.models.norms import describe
from lnfree_interp.models.running import Edit, run_and_keep, to_logits, watched
from lnfree_interp.models.site_names import SCALERS, name_sites
from lnfree_interp.models.sites import (
    first_constants,
    has_norm_sites,
    list_norm_sites,
    list_scalers,
    live_sites,
    module_at,
    norm_at,
    norm_path,
)
from lnfree_interp.models.weighing import Weighing, weighing_of


class HookedView(View):
    """The view of a `HookedTransformer` in any form."""

    def require_plain_sum(self) -> None:
        """As `View.require_plain_sum`."""
        cfg = self.cfg
        positions = cfg.positional_embedding_type
        unsupported = {
            "a norm behind the embedding": cfg.post_embedding_ln,
            f"{positions!r} positions": positions not in ("standard", "rotary"),
            "mixtures of experts": cfg.num_experts is not None,
            "token types": getattr(cfg, "use_token_type_ids", False),
            "norms after the sublayers only": cfg.original_architecture in POST_NORM_ARCHITECTURES,
            "attention sinks": cfg.use_attention_sinks,
            "clipped queries, keys and values": cfg.clip_qkv is not None,
        }
        found = [what for what, is_so in unsupported.items() if is_so]
        if has_norm_sites(self.model) or cfg.use_normalization_before_and_after:
            found += self._not_linear_inside()
        if found:
            raise UnsupportedModelError(f"cannot take apart a model with {', '.join(found)}")

    @property
    def inner_sites(self) -> list[str]:
        """As `View.inner_sites`."""
        if self.cfg.normalization_type is None:
            return []
        return [str(site) for site in list_norm_sites(self.model) if site.kind in WITHIN]

    def _not_linear_inside(self) -> list[str]:
        """What stands inside or behind the sublayers, and is in the way of a plain sum."""
        found = []
        sites = [str(site) for site in live_sites(self.model) if site.kind in WITHIN]
        if sites and not noting():
            found.append(
                f"live norms inside or behind the sublayers: {name_sites(sites)}. "
                "lf.freeze_for(model, question, text) freezes them, with all else that the "
                "question reads through, and measures the price"
            )
        if apart := [name for name in first_constants(self.model) if name.endswith(WITHIN)]:
            found.append(
                f"constants of their own for first tokens at {name_sites(apart)}: freeze these "
                "sites with one constant, freeze_site(model, site, sigma)"
            )
        if scales := [name for name in list_scalers(self.model) if name.endswith("resid_scale")]:
            found.append(
                f"factors on the stream itself, {name_sites(scales)} (fold(model) merges them once "
                "no norm is live)"
            )
        return found

    def _attention(self, layer: int) -> Attention:
        attn = self.model.blocks[layer].attn
        found = Attention.of(attn, float(attn.attn_scale), self.score_cap)
        W_O, b_O = self._written(f"blocks.{layer}.attn", "O", found.W_O, found.b_O)
        return replace(found, W_O=W_O, b_O=b_O)

    def _written(
        self, sublayer: str, leaf: str, W: Tensor, b: Tensor
    ) -> tuple[Float[Tensor, "*head out d_model"], Float[Tensor, " d_model"]]:
        """The weights by which a sublayer writes, with what stands before and behind them."""
        if not has_norm_sites(self.model):
            return W, b
        block = sublayer.rpartition(".")[0]
        places = [f"{block}.{kind}" for kind in (*WITHIN, *SCALERS)]
        maps = {name: describe(at) for name in places if (at := module_at(self.model, name))}
        if noting():  # some of these norms may be live then
            maps = {name: norm for name, norm in maps.items() if norm.affine}
        named = {f"{sublayer}.W_{leaf}": W, f"{sublayer}.b_{leaf}": b}
        found = dict(fold_weights(named, maps, "folded"))
        return found[f"{sublayer}.W_{leaf}"], found[f"{sublayer}.b_{leaf}"]

    def _mlp(self, layer: int) -> MLP:
        mlp = self.model.blocks[layer].mlp
        gate = mlp.W_gate.detach() if self.gated else None
        W_in, W_out, b_in, b_out = (W.detach() for W in (mlp.W_in, mlp.W_out, mlp.b_in, mlp.b_out))
        W_out, b_out = self._written(f"blocks.{layer}.mlp", "out", W_out, b_out)
        return MLP(W_in, gate, W_out, b_in, b_out, mlp.act_fn)

    def weighing(self, layer: int) -> Weighing:
        """As `View.weighing`."""
        return weighing_of(self.model.blocks[layer].attn)

    def rotations(self, layer: int, n_pos: int) -> Float[Tensor, "pos d_head d_head"]:
        """As `View.rotations`."""
        eye = torch.eye(self.cfg.d_head, dtype=self.W_E.dtype, device=self.device)
        turned = self.model.blocks[layer].attn.apply_rotary(
            eye[:, None, None].expand(-1, n_pos, 1, -1)
        )
        return turned[:, :, 0].transpose(0, 1)

    def _map(self, site: str) -> NormMap | None:
        """What the norm at a site does; None in a folded model."""
        return None if self.cfg.normalization_type is None else norm_at(self.model, site)

    def is_affine(self, site: str) -> bool:
        """As `View.is_affine`."""
        norm = self._map(site)
        return norm is None or norm.affine

    def bends(self, site: str) -> bool:
        """As `View.bends`."""
        norm = self._map(site)
        return norm is not None and norm.pointwise

    def scale_hook(self, site: str) -> str | None:
        """As `View.scale_hook`."""
        norm = self._map(site)
        if norm is None or (norm.affine and norm.first is None):
            return None
        if norm.pointwise:
            if noting():
                return None
            raise UnsupportedModelError(
                f"{site} bends each entry by a curve, so that no scale of a token says what it "
                "does, and nothing can be held: freeze it, lf.freeze_for(model, [site], text), or "
                "remove the model's norms"
            )
        return f"{norm_path(self.model, site)}.hook_scale"

    def read(self, site: str, scale: Float[Tensor, "*batch one"] | None) -> Read:
        """As `View.read`."""
        norm = self._map(site)
        if norm is None:
            return Read()
        divisor = norm.scale if norm.affine and scale is None else scale
        if norm.pointwise and noting():
            divisor = 1.0
        assert divisor is not None
        gain, bias = (None if x is None else x.detach() for x in (norm.gain, norm.bias))
        return Read(
            divisor / norm.factor if norm.factor != 1 else divisor, gain, bias, norm.centred
        )

    def _norm(self, site: str) -> nn.Module | None:
        if self.cfg.normalization_type is None:
            return None
        return self.model.get_submodule(norm_path(self.model, site))

    def through_norm(self, site: str, x: Stream, *, first: First = None) -> Stream:
        """As `View.through_norm`."""
        norm = self._norm(site)
        with telling(first):
            return x if norm is None else norm(x)

    def through_norm_in_float64(self, site: str) -> Callable[[Tensor], Tensor]:
        """As `View.through_norm_in_float64`."""
        found = self._norm(site)
        if found is None:
            return lambda x: x
        norm: Any = copy.deepcopy(found).double()
        if hasattr(norm, "cfg"):  # TransformerLens' norms cast their output to cfg.dtype
            norm.cfg = replace(norm.cfg, dtype=torch.float64)
        return norm

    def run(
        self,
        x: Int[Tensor, "batch pos"] | Stream,
        names: Collection[str] = (),
        *,
        start: int = 0,
        stop: int | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> tuple[Stream, dict[str, Tensor]]:
        """As `View.run`."""
        stop = self.n_layers if stop is None else stop
        return run_and_keep(self.model, x, names, stop, start, edits)

    def logits(
        self, resid: Stream, names: Collection[str] = (), *, first: First = None
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
        """As `View.logits`."""
        with telling(first), watched(self.model, names) as found:
            return to_logits(self.model, resid), found
