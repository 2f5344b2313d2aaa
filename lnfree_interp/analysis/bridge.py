"""`TransformerBridge` of TransformerLens 4 as a view: models of transformers, and native ones."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from lnfree_interp.analysis.stream import First, Read, Stream
from lnfree_interp.analysis.sublayers import MLP, Attention
from lnfree_interp.analysis.view import Side, View
from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.models.running import Edit, Hook, listening
from lnfree_interp.numerics import LNFREE_EPSILON, TOLERANCE, measure_error, soft_cap

Handed = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""The arguments that each block gets besides the stream."""
Show = Callable[[Tensor], Tensor]
_SHOW_SCORES = (
    "JointQKVAttentionBridge",
    "JointQKVPositionEmbeddingsAttentionBridge",
    "PositionEmbeddingsAttentionBridge",
)
_MLPS = ("MLPBridge", "GatedMLPBridge")
_STRUCTURE = 1e-4
"""The relative error above which a model is not what its weights describe."""


class _Stop(Exception):  # noqa: N818
    """Ends a run that has reached its last block, and carries the stream out of it."""

    def __init__(self, stream: Stream):
        self.stream = stream


@dataclass(frozen=True)
class _Norm:
    """A norm as transformers defines it."""

    module: Any
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float
    centred: bool

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        y = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        y = y if self.gain is None else y * self.gain
        return y if self.bias is None else y + self.bias

    def in_float64(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """A stream after the norm, without rounding to the model's dtype."""
        return self(x.double())

    def hook(self, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        """The norm's output, which replaces what transformers computed in float32."""
        return self(args[0])


class BridgeView(View):
    """A `TransformerBridge`, with activations under TransformerLens 3.9's names and shapes.

    A norm whose epsilon drowns every variance, as in our exports to transformers, is constant: the
    model's own still divides by sqrt(variance + epsilon), a relative variance / (2 epsilon) apart.

    In float64, what transformers computes in float32 all the same (RMSNorm, softmax, cosines) is
    computed in float64 while a run lasts. Two tables keep their float32 entries, which are the
    model: the cosines of a native model, and frequencies that are not the default ones.
    """

    def __init__(self, model: Any):
        self._points: dict[str, Any] = dict(model.hook_dict)
        self._native = type(model.original_model).__name__ == "NativeModel"
        self._given: tuple[int, Handed] = (0, [])
        super().__init__(model)

    def require_plain_sum(self) -> None:
        """As `View.require_plain_sum`; a run over two tokens checks weights and config."""
        cfg, blocks = self.cfg, list(self.model.blocks)
        positions = cfg.positional_embedding_type
        known = _SHOW_SCORES + ("AttentionBridge",) * self._native
        attns = [getattr(block, "attn", None) for block in blocks]
        inner = [getattr(attn, "original_component", None) for attn in attns]
        mlps = {type(getattr(block, "mlp", None)).__name__ for block in blocks if self.has_mlps}
        unsupported = {
            "norms behind the sublayers": any(
                hasattr(block, name) for block in blocks for name in ("ln1_post", "ln2_post")
            ),
            f"{positions!r} positions": positions not in ("standard", "rotary"),
            "attention that does not show its scores": any(
                type(attn).__name__ not in known for attn in attns
            ),
            "attention sinks": any(getattr(one, "sinks", None) is not None for one in inner),
            f"MLPs of the kind {', '.join(sorted(mlps))}": not mlps <= set(_MLPS),
            "parallel blocks, which a native model computes one after the other": (
                self._native and self.parallel
            ),
        }  # fmt: skip
        found = [what for what, is_so in unsupported.items() if is_so]
        if not found:
            if any(hasattr(attn, "q_norm") for attn in attns):
                self.cfg = copy.copy(cfg)
                self.cfg.use_qk_norm = True
            found = self._unexplained()
        if found:
            raise UnsupportedModelError(f"cannot take apart a model with {', '.join(found)}")

    @property
    def explains_scores(self) -> bool:
        """As `View.explains_scores`: norms on queries and keys are not known here."""
        return not getattr(self.cfg, "use_qk_norm", False)

    def qk_norm(self, layer: int, side: Side) -> str | None:
        """As `View.qk_norm`."""
        if self.explains_scores:
            return None
        raise UnsupportedModelError(
            "queries and keys pass norms of their own, which this question cannot read through on "
            "a TransformerBridge: take the HookedTransformer that lf.load gives, or freeze them "
            "there, merge them with fold(model), and export that"
        )

    @torch.no_grad()
    def _unexplained(self) -> list[str]:
        """What a run over two tokens shows that weights and config do not explain."""
        tokens, found = torch.arange(2, device=self.device)[None] % self.cfg.d_vocab, []
        names = ["hook_embed", *(["hook_pos_embed"] * self.has_positions)]
        short = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_post"]
        short += ["attn.hook_attn_scores", self._meeting("q"), self._meeting("k")]
        short += ["hook_mlp_out", "mlp.hook_post", "mlp.hook_pre"] * self.has_mlps
        short += ["mlp.hook_pre_linear"] * self.gated
        sites = [f"blocks.{i}.ln2" for i in range(self.n_layers * self.has_mlps)]
        scales = {site: self.scale_hook(site) for site in [*sites, "ln_final"]}
        names += [scale for site in sites if (scale := scales[site])]
        names += [f"blocks.{layer}.{name}" for layer in range(self.n_layers) for name in short]
        last, acts = self.run(tokens, names)
        if missing := set(names) - set(acts):
            return [f"no activation at {min(missing)}"]

        def check(what: str, said: Tensor, seen: Tensor) -> None:
            error = measure_error(said, seen)
            if not error.relative <= max(TOLERANCE[error.dtype], _STRUCTURE) and what not in found:
                found.append(what)

        def read(site: str, x: Stream) -> Stream:
            norm = self.read(site, None if (hook := scales[site]) is None else acts[hook])
            return norm.forward(x) if norm.bias is None else norm.forward(x) + norm.bias

        stream = acts["hook_embed"]
        check("a scaled embedding", self.W_E[tokens], stream)
        stream = stream + acts["hook_pos_embed"] if self.has_positions else stream
        check(
            "more in its embedding than tokens and positions",
            stream,
            acts["blocks.0.hook_resid_pre"],
        )
        for layer in range(self.n_layers):
            act = {name: acts[f"blocks.{layer}.{name}"] for name in short}
            attention, before = self.attention(layer), act["hook_resid_pre"]
            z, wrote = act["attn.hook_z"], act["hook_attn_out"]
            out = attention.write(z, list(range(z.shape[2]))).sum(2) + attention.b_O
            check("attention that writes more than its heads", out, wrote)
            scores = self._scores(layer, *(act[self._meeting(x)] for x in "qk"))
            if self.explains_scores:
                check("other scores", scores.tril(), act["attn.hook_attn_scores"].tril())
            stream = before + wrote
            if self.has_mlps:
                mlp, pre, wrote = self.mlp(layer), act["mlp.hook_pre"], act["hook_mlp_out"]
                W, b = mlp.before_activation
                x = read(f"blocks.{layer}.ln2", before if self.parallel else stream)
                check("other inputs of its neurons", x @ W + b, pre)
                post = mlp.activation(pre)
                post = post * act["mlp.hook_pre_linear"] + mlp.b_in if self.gated else post
                check("another activation function", post, act["mlp.hook_post"])
                check(
                    "MLPs that write more than their neurons", post @ mlp.W_out + mlp.b_out, wrote
                )
                stream = stream + wrote
            check("more in a block than attention and MLP", stream, act["hook_resid_post"])
        hook = scales["ln_final"]
        logits, acts = self.logits(last, [hook] if hook else [])
        said = soft_cap(read("ln_final", last) @ self.W_U + self.b_U, self.logit_cap)
        check("another unembedding", said, logits)
        whole = self.model.original_model(input_ids=tokens, use_cache=False)
        check("something behind its unembedding", logits, getattr(whole, "logits", whole))
        return found

    # Weights

    def _attention(self, layer: int) -> Attention:
        attn, cfg = self.model.blocks[layer].attn, self.cfg
        weights: list[Tensor] = []
        for name in Attention.NAMES:
            W, heads = getattr(attn, name), cfg.n_heads
            if W is None:
                W = self.W_E.new_zeros(cfg.d_model if name == "b_O" else (heads, cfg.d_head))
            shared = heads // len(W) if name[-1] in "KV" else 1
            weights.append(W.detach().repeat_interleave(shared, 0))
        scale = cfg.d_head**0.5
        if self._native:
            scale = float(attn.original_component.scale)
        elif type(attn).__name__ == "PositionEmbeddingsAttentionBridge":
            scale = 1 / getattr(attn.original_component, "scaling", 1 / scale)
        elif getattr(cfg, "scale_attn_by_inverse_layer_idx", False):
            scale *= layer + 1
        W_Q, W_K, W_V, W_O, *biases = weights
        return Attention(W_Q, W_K, W_V, W_O, *biases, scale=scale, cap=self.score_cap)

    def _mlp(self, layer: int) -> MLP:
        mlp, new = self.model.blocks[layer].mlp, self.W_E.new_zeros
        W_in, W_out = mlp.W_in.detach(), mlp.W_out.detach()
        gate = mlp.W_gate.detach() if self.gated else None
        b_in, b_out = (getattr(mlp, name, None) for name in ("b_in", "b_out"))
        b_in = new(W_in.shape[1]) if b_in is None else b_in.detach()
        b_out = new(W_out.shape[1]) if b_out is None else b_out.detach()
        inner = mlp.original_component
        names = [name for name in ("act", "act_fn", "activation_fn") if hasattr(inner, name)]
        return MLP(W_in, gate, W_out, b_in, b_out, getattr(inner, names[0]))

    def rotations(self, layer: int, n_pos: int) -> Float[Tensor, "pos d_head d_head"]:
        """As `View.rotations`."""
        eye = torch.eye(self.cfg.d_head, dtype=self.W_E.dtype, device=self.device)
        turned = self._turned(
            eye[:, None, None].expand(-1, n_pos, 1, -1), self._angles(layer, n_pos)
        )
        return turned[:, :, 0].transpose(0, 1)

    def _angles(self, layer: int, n_pos: int) -> tuple[Tensor, Tensor]:
        """The model's own cosines and sines, [pos, rotated]."""
        if self._native:
            rotary = self.model.blocks[layer].attn.original_component.rotary
            return rotary.cos_cached[:n_pos], rotary.sin_cached[:n_pos]
        cos, sin = self._handed(n_pos)[layer][1]["position_embeddings"]
        return cos[0], sin[0]

    def _turned(
        self, x: Float[Tensor, "batch pos head d"], angles: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "batch pos head d"]:
        cos, sin = (angle.to(x)[:, None] for angle in angles)
        size = cos.shape[-1]
        turned, rest = x[..., :size], x[..., size:]
        if self._native:  # neighbouring entries are rotated together
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            other = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), -1)
        return torch.cat((turned * cos + other * sin, rest), -1)

    # How it reads the stream

    def is_affine(self, site: str) -> bool:
        """As `View.is_affine`."""
        norm = self._norm(site)
        return norm is None or norm.eps >= LNFREE_EPSILON

    def scale_hook(self, site: str) -> str | None:
        """As `View.scale_hook`."""
        return None if self.is_affine(site) else f"{self._path(site)}.hook_scale"

    def read(self, site: str, scale: Float[Tensor, "*batch one"] | None) -> Read:
        """As `View.read`."""
        norm = self._norm(site)
        if norm is None:
            return Read()
        held = norm.eps**0.5 if norm.eps >= LNFREE_EPSILON else scale
        assert held is not None
        return Read(held, norm.gain, norm.bias, norm.centred)

    def _norm(self, site: str) -> _Norm | None:
        return _as_norm(reduce(getattr, self._path(site).split("."), self.model), site)

    def _path(self, site: str) -> str:
        """The module at a norm site of this model."""
        site = site.removesuffix(".qk").removesuffix(".v")
        block = self.model.blocks[0]
        return site if hasattr(block, "ln2") else site.replace(".ln2", ".ln1")

    def through_norm(self, site: str, x: Stream, *, first: First = None) -> Stream:
        """As `View.through_norm`."""
        norm = self._norm(site)
        if norm is None:
            return x
        with self._watched():
            return norm.module(x)

    def through_norm_in_float64(self, site: str) -> Callable[[Tensor], Tensor]:
        """As `View.through_norm_in_float64`."""
        norm = self._norm(site)
        return (lambda x: x) if norm is None else norm.in_float64

    # How it runs

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
        stop, n_pos, x = self.n_layers if stop is None else stop, x.shape[1], x.to(self.device)
        handed = self._handed(n_pos) if x.is_floating_point() else []
        with self._watched(names, edits, n_pos) as found:
            if not x.is_floating_point():
                return self._pass(x, stop), found
            for layer in range(start, stop):
                args, kwargs = handed[layer]
                out = self.model.blocks[layer](x, *args, **kwargs)
                x = out if isinstance(out, Tensor) else out[0]
        return x, found

    def logits(
        self, resid: Stream, names: Collection[str] = (), *, first: First = None
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
        """As `View.logits`."""
        with self._watched(names) as found:
            logits = self.model.unembed(self.model.ln_final(resid))
        return soft_cap(logits, self.logit_cap), found

    def _pass(self, tokens: Int[Tensor, "batch pos"], stop: int) -> Stream:
        """The stream before a block, by the model's own forward: `TransformerBridge`'s writes to
        the blocks where it stops."""

        def leave(args: Any, kwargs: Any, output: Tensor) -> None:
            raise _Stop(output)

        end = self.model.ln_final if stop == self.n_layers else self.model.blocks[stop]
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        try:
            with listening([(end.hook_in, leave)]):
                self.model.original_model(input_ids=tokens, position_ids=places, use_cache=False)
        except _Stop as stopped:
            return stopped.stream
        raise UnsupportedModelError(f"the model never reaches block {stop} of {self.n_layers}")

    @torch.no_grad()
    def _handed(self, n_pos: int) -> Handed:
        """The arguments that the model gives its blocks besides the stream: masks, cosines,
        positions."""
        length, handed = self._given
        if length != n_pos:
            handed = []

            def take(args: Any, kwargs: Any, output: Any) -> None:
                handed.append((args[1:], {k: x for k, x in kwargs.items() if k != "hidden_states"}))

            tokens = torch.zeros(1, n_pos, dtype=torch.long, device=self.device)
            with self._watched(), listening([(block, take) for block in self.model.blocks]):
                self._pass(tokens, self.n_layers)
            self._given = (n_pos, handed)
        return handed

    @contextmanager
    def _watched(
        self, names: Collection[str] = (), edits: Mapping[str, Edit] | None = None, n_pos: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """As `models.running.watched`, under 3.9's names."""
        edits, found, hooks = edits or {}, {}, []
        hidden = [x for x in names if self._native and x.endswith(".hook_attn_scores")]
        sides = {
            x: [x.replace("attn.hook_attn_scores", self._meeting(w)) for w in "qk"] for x in hidden
        }
        shown = [
            x for x in (*names, *(y for x in sides.values() for y in x), *edits) if x not in hidden
        ]
        if refused := [x for x in edits if x in hidden or x.endswith("hook_resid_mid")]:
            raise UnsupportedModelError(f"a TransformerBridge does not let {refused[0]} be changed")

        def listen(name: str) -> tuple[nn.Module, Hook]:
            point, show, put = self._point(name, n_pos)

            def hook(args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
                value = show(output)
                changed = edits[name](value) if name in edits else None
                found[name] = value if changed is None else changed
                return None if changed is None else put(changed)

            return point, hook

        hooks = [listen(name) for name in dict.fromkeys(shown)]
        before, after = self._exact()
        with listening([*before, *hooks, *after]):
            yield found
        for name, (q, k) in sides.items():
            found[name] = self._scores(int(name.split(".")[1]), found[q], found[k])

    def _meeting(self, which: str) -> str:
        """The hook name of the queries or keys whose products are the scores."""
        return f"attn.hook_{'rot_' * self.rotary}{which}"

    def _point(self, name: str, n_pos: int) -> tuple[nn.Module, Show, Show]:
        """The hook point of an activation, and functions from its shape to 3.9's and back."""
        at, _, kind = name.rpartition(".")
        turned, back, shown = None, None, name
        if "hook_rot_" in kind and not self._reconstructed(layer := int(name.split(".")[1])):
            cos, sin = turned = self._angles(layer, n_pos)
            size = cos.square() + sin.square()
            back, shown = (cos / size, -sin / size), f"{at}.hook_{kind[-1]}"
        if (point := self._points.get(shown)) is None:
            raise UnsupportedModelError(f"the model has no hook point {name}")
        heads = point.hook_conversion

        def show(x: Tensor) -> Tensor:
            x = x if heads is None else heads.convert(x)
            if kind == "hook_attn_scores":
                x = x.masked_fill(x <= torch.finfo(x.dtype).min / 4, -torch.inf)
            return x if turned is None else self._turned(x, turned)

        def put(x: Tensor) -> Tensor:
            x = x if back is None else self._turned(x, back)
            return x if heads is None else heads.revert(x)

        return point, show, put

    def _scores(self, layer: int, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        """Scores from the queries and keys after any rotation, in a model without windows."""
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = einsum(q, k, "b q h k, b p h k -> b h q p") / self.attention(layer).scale
        scores = soft_cap(scores, self.score_cap)
        return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)

    def _reconstructed(self, layer: int) -> bool:
        """Whether the bridge shows rotated queries, and takes the softmax in float32."""
        return type(self.model.blocks[layer].attn).__name__ == "PositionEmbeddingsAttentionBridge"

    def _exact(self) -> tuple[list[tuple[nn.Module, Hook]], list[tuple[nn.Module, Hook]]]:
        """The hooks that keep a run in float64, for before and after a caller's hooks."""
        before: list[tuple[nn.Module, Hook]] = []
        after: list[tuple[nn.Module, Hook]] = []
        if self.W_E.dtype != torch.float64:
            return before, after
        norms = [self.model.ln_final]
        for layer, block in enumerate(self.model.blocks):
            norms += [getattr(block, name, None) for name in ("ln1", "ln2")]
            norms += [getattr(block.attn, name, None) for name in ("q_norm", "k_norm")]
            if self._reconstructed(layer):
                look, weigh = _softmax()
                before.append((block.attn.hook_pattern, weigh))
                after.append((block.attn.hook_attn_scores, look))
        for norm in [_as_norm(one, "a norm") for one in norms if one is not None]:
            if norm is not None and not isinstance(norm.module.original_component, nn.LayerNorm):
                before.append((norm.module.original_component, norm.hook))
        if hasattr(self.model, "rotary_emb"):
            before.append((self.model.rotary_emb.original_component, self._cosines))
        return before, after

    def _cosines(self, args: Any, kwargs: Any, output: tuple[Tensor, Tensor]) -> Any:
        """Default rotary angles in float64; None, which changes nothing, for other angles."""
        said = getattr(self.model.original_model.config, "rope_parameters", None) or {}
        if said.get("rope_type") != "default":
            return None
        places, size = args[1] if len(args) > 1 else kwargs["position_ids"], output[0].shape[-1]
        steps = torch.arange(0, size, 2, device=places.device).double() / size
        angles = (places[..., None].double() * said["rope_theta"] ** -steps).repeat(1, 1, 2)
        return (angles.cos(), angles.sin()) if angles.cos().allclose(output[0], atol=1e-2) else None


def _softmax() -> tuple[Hook, Hook]:
    """Reads scores, and gives their softmax as the pattern."""
    seen: list[Tensor] = []

    def look(args: Any, kwargs: Any, output: Tensor) -> None:
        seen.append(output)

    def weigh(args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return seen.pop().softmax(-1)

    return look, weigh


def _as_norm(module: Any, site: str) -> _Norm | None:
    """The norm of a module; None where the stream is read unchanged."""
    inner = module.original_component
    if isinstance(inner, nn.Identity):
        return None
    if not hasattr(module, "uses_rms_norm"):
        raise UnsupportedModelError(f"{site} is a {type(module).__name__}, which is not linear")
    gain, bias = (getattr(inner, name, None) for name in ("weight", "bias"))
    if gain is not None:
        gain = gain.detach() + 1 if module.uses_weight_offset else gain.detach()
    eps = getattr(inner, "eps", getattr(inner, "variance_epsilon", module.config.eps))
    bias = None if bias is None else bias.detach()
    return _Norm(module, gain, bias, float(eps), not module.uses_rms_norm)
