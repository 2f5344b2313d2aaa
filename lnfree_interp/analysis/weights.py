"""What the weights alone say: without norms, products of weights are what the model computes.

A writer (a head's W_O, a neuron's row of W_out, an embedding) and a reader (a head's W_Q, W_K or
W_V, a neuron's column of W_in, the unembedding) meet in the stream; their product does not depend
on the input. With a live norm it would, by a factor for every token, so live norms are refused.
Everything is kept factored: nothing of size d_vocab x d_vocab is formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix, HookedTransformer

from lnfree_interp.analysis.attention import require_head
from lnfree_interp.analysis.contributions import Component
from lnfree_interp.analysis.questions import Answer, read_answers, strings
from lnfree_interp.analysis.reads import Read, held, read
from lnfree_interp.analysis.writes import require_decomposable
from lnfree_interp.errors import DataError, UnsupportedModelError

Input = Literal["Q", "K", "V"]


@torch.no_grad()
def writer_weights(
    model: HookedTransformer, component: str | Component
) -> Float[Tensor, "width d_model"]:
    """What a component writes with: W_O of a head, a row of W_out, all of W_E or W_pos, a bias.

    Raises:
        DataError: if the model has no such component, or it is none of these.
    """
    return _writer_weights(model, component).detach()


def _writer_weights(
    model: HookedTransformer, component: str | Component
) -> Float[Tensor, "width d_model"]:
    one = component if isinstance(component, Component) else Component.parse(component)
    layers = model.cfg.n_layers
    if one.pos is not None or one.through:
        raise DataError(f"{one.label}: weights are the same at every position and on every path")
    if one.layer is not None and not 0 <= one.layer < layers:
        raise DataError(f"{one.label}: the model has layers 0 to {layers - 1}")
    block: Any = None if one.layer is None else model.blocks[one.layer]
    if one.kind == "embed":
        return model.W_E
    if one.kind == "pos_embed" and model.cfg.positional_embedding_type == "standard":
        return model.W_pos
    if block is not None and one.kind == "head" and one.index is not None:
        require_head(model, one.layer or 0, one.index)
        return block.attn.W_O[one.index]
    if block is not None and one.kind == "b_O":
        return block.attn.b_O[None]
    if block is not None and not model.cfg.attn_only:
        if one.kind == "neuron" and one.index is not None:
            n_neurons = block.mlp.W_out.shape[0]
            if not 0 <= one.index < n_neurons:
                raise DataError(f"{one.label}: layer {one.layer} has neurons 0 to {n_neurons - 1}")
            return block.mlp.W_out[one.index][None]
        if one.kind == "mlp_out":
            return block.mlp.W_out
        if one.kind == "b_out":
            return block.mlp.b_out[None]
    raise DataError(f"{one.label} writes with no weights of its own in this model")


def _through(norm: Read, W: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
    """A reader's weights with its norm, which is constant, merged in."""
    return norm.weights_back(W.detach()) / norm.scale


def _norm(model: HookedTransformer, name: str) -> Read:
    held(model, False, [name])
    return read(model, {}, name)


@torch.no_grad()
def reader_weights(
    model: HookedTransformer, component: str | Component, which: Input | None = None
) -> Float[Tensor, "d_model width"]:
    """What a component reads the stream with, its norm merged in.

    Args:
        model: LN-free.
        component: A head (`"L2H5"`, with `which`), a neuron (`"L2N310"`; the input of its
            activation function), a layer's MLP (`"2_mlp_out"`), or `"b_U"` for the unembedding.
        which: Of a head: `"Q"`, `"K"` or `"V"`.

    Raises:
        DataError: if the model has no such component, or it does not read.
        InexactError: if the norm is live.
    """
    require_decomposable(model)
    one = component if isinstance(component, Component) else Component.parse(component)
    if one.kind == "b_U":
        return _through(_norm(model, "ln_final"), model.W_U)
    writer_weights(model, one)  # exists
    assert one.layer is not None or one.kind in ("embed", "pos_embed")
    if one.kind == "head" and one.layer is not None:
        if which not in ("Q", "K", "V"):
            raise DataError(f"say with which of Q, K and V {one.label} reads")
        site = f"blocks.{one.layer}.ln1.{'v' if which == 'V' else 'qk'}"
        W = getattr(model.blocks[one.layer].attn, f"W_{which}")[one.index]
        return _through(_norm(model, site), W)
    if one.kind in ("neuron", "mlp_out") and one.layer is not None:
        mlp: Any = model.blocks[one.layer].mlp
        W = mlp.W_gate if model.cfg.gated_mlp else mlp.W_in
        W = W if one.index is None else W[:, one.index][:, None]
        return _through(_norm(model, f"blocks.{one.layer}.ln2"), W)
    raise DataError(f"{one.label} does not read the stream")


@torch.no_grad()
def virtual_weights(
    model: HookedTransformer,
    writer: str | Component,
    reader: str | Component,
    which: Input | None = None,
) -> FactoredMatrix:
    """From what a component holds to what a later one reads of it: W_write W_read.

    Head to head, by `which`: [d_head, d_head]. It is the whole direct effect of the one on the
    other, for every input: with z of the writer at a position, its share of the reader's query, key
    or value there, before any rotation, is z times this. Biases are not in it.

    Args:
        model: LN-free.
        writer: `"L0H3"`, `"L0N12"`, `"0_mlp_out"`, `"embed"`, `"pos_embed"`, `"0_b_O"`.
        reader: A head (`"L2H5"`, with `which`), a neuron (`"L2N310"`; the input of its activation
            function), a layer's MLP (`"2_mlp_out"`), or `"b_U"` for the unembedding.
        which: Of a head that reads, `"Q"`, `"K"` or `"V"`.

    Returns:
        Factored, [width of the writer, width of the reader]; a width is d_head, 1 for a neuron or a
        bias, the number of neurons of an MLP, of tokens or of positions. What the reader gets per
        unit of what the writer holds.

    Raises:
        DataError: if the reader does not come after the writer, either does not exist, or a head
            reads without `which`.
        InexactError: if the reader's norm is live, or the logits that it reads are capped.
        UnsupportedModelError: for a model whose stream has other parts, or with norms on queries
            and keys.

    Source:
        Virtual weights, between heads: Elhage et al. 2021, https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> lf.virtual_weights(free, "L0H3", "L2H5", "K").AB.shape
        torch.Size([32, 32])
        >>> lf.virtual_weights(free, "L0N12", "b_U").AB.shape
        torch.Size([1, 4096])
    """
    one, two = (
        x if isinstance(x, Component) else Component.parse(x) for x in (writer, reader)
    )  # fmt: skip
    if one.layer is not None and two.layer is not None:
        same_block = one.layer == two.layer and two.kind in ("neuron", "mlp_out")
        same_block = same_block and one.kind in ("head", "b_O") and not model.cfg.parallel_attn_mlp
        if not (one.layer < two.layer or same_block):
            raise DataError(f"{two.label} does not come after {one.label}: it cannot read it")
    return FactoredMatrix(writer_weights(model, one), reader_weights(model, two, which))


@dataclass(frozen=True, eq=False, repr=False)
class TokenTable:
    """A table over tokens that is kept as two factors.

    Attributes:
        left: [row, rank], whose product with `right` is the table, in the unit of `what`.
        right: [rank, column].
        what: What an entry is, in words.
        model: Whose tokens they are.
        tokens_in_rows: Whether rows are tokens; else they are numbers.
        tokens_in_columns: The same of columns.
    """

    left: Float[Tensor, "row rank"]
    right: Float[Tensor, "rank column"]
    what: str
    model: HookedTransformer
    tokens_in_rows: bool = True
    tokens_in_columns: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return (len(self.left), self.right.shape[1])

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"TokenTable({self.what}, {rows} x {columns}, rank {self.left.shape[1]} at most)"

    @property
    def matrix(self) -> FactoredMatrix:
        """For TransformerLens' own tools: singular values, eigenvalues, norms."""
        return FactoredMatrix(self.left, self.right)

    def row(self, name: Answer) -> Float[Tensor, " column"]:
        """[column], one row, by token or number.

        Raises:
            DataError: if there is no such row.
        """
        return self.left[self._index(name, self.tokens_in_rows, len(self.left))] @ self.right

    def column(self, name: Answer) -> Float[Tensor, " row"]:
        """[row], one column, by token or number.

        Raises:
            DataError: if there is no such column.
        """
        return self.left @ self.right[:, self._index(name, self.tokens_in_columns, self.shape[1])]

    def entry(self, row: Answer, column: Answer) -> float:
        """One entry, by token or number.

        Raises:
            DataError: if there is no such row or column.
        """
        i = self._index(row, self.tokens_in_rows, self.shape[0])
        j = self._index(column, self.tokens_in_columns, self.shape[1])
        return (self.left[i] @ self.right[:, j]).item()

    def _index(self, name: Answer, tokens: bool, size: int) -> int:
        if tokens:
            return int(read_answers(self.model, name, 1, True, "token")[0])
        if not isinstance(name, int) or not -size <= name < size:
            raise DataError(f"rows here are numbers from 0 to {size - 1}, not {name!r}")
        return name

    def top(
        self, k: int = 20, row: Answer | None = None, smallest: bool = False, chunk: int = 1024
    ) -> pd.DataFrame:
        """The largest entries, of one row or of the whole table: `row`, `column`, `value`.

        Args:
            k: How many.
            row: Only this one.
            smallest: The most negative instead.
            chunk: Rows formed at once.

        Raises:
            DataError: if there is no such row, or `k` or `chunk` is less than one.
        """
        if k < 1 or chunk < 1:
            raise DataError(f"k={k} and chunk={chunk} must be positive")
        chosen = range(len(self.left)) if row is None else [
            self._index(row, self.tokens_in_rows, len(self.left)) % len(self.left)
        ]  # fmt: skip
        sign = -1 if smallest else 1
        best_values = self.left.new_empty(0)
        best_places = torch.empty(0, dtype=torch.long, device=self.left.device)
        width = self.shape[1]
        for start in range(0, len(chosen), chunk):
            rows = torch.tensor(chosen[start : start + chunk], device=self.left.device)
            values = sign * (self.left[rows] @ self.right).flatten()
            found = values.topk(min(k, len(values)))
            places = rows[found.indices // width] * width + found.indices % width
            values = torch.cat([best_values, found.values])
            order = values.topk(min(k, len(values))).indices
            best_values, best_places = values[order], torch.cat([best_places, places])[order]
        at = best_places.tolist()
        return pd.DataFrame(
            {
                "row": self._names([place // width for place in at], self.tokens_in_rows),
                "column": self._names([place % width for place in at], self.tokens_in_columns),
                "value": (sign * best_values).tolist(),
            }
        )

    def _names(self, ids: Sequence[int], tokens: bool) -> list[str] | list[int]:
        return strings(self.model, ids) if tokens else list(ids)


@torch.no_grad()
def bigram_table(model: HookedTransformer) -> TokenTable:
    """What a token's embedding alone adds to each next token's logit: W_E W_U, in logits.

    The direct path only: positions, biases, heads and MLPs are not in it.

    Args:
        model: LN-free; of the norms only the final one matters.

    Returns:
        Table [token, next token], in logits.

    Raises:
        InexactError: if the final norm is live or the logits are capped.
        UnsupportedModelError: for a model whose stream has other parts.

    Source:
        Elhage et al. 2021, https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> lf.bigram_table(free)
        TokenTable(logit from the embedding, 4096 x 4096, rank 192 at most)
        >>> lf.bigram_table(free).row(" in").shape
        torch.Size([4096])
    """
    require_decomposable(model)
    return TokenTable(
        model.W_E.detach(), reader_weights(model, "b_U"), "logit from the embedding", model
    )


@torch.no_grad()
def ov_table(model: HookedTransformer, layer: int, head: int) -> TokenTable:
    """What looking at a token's embedding adds to each logit: W_E W_V W_O W_U, in logits.

    For an attention weight of one. Positions and biases are not in it, nor what else is in the
    stream.

    Args:
        model: LN-free.
        layer: Of the head.
        head: Its index.

    Returns:
        Table [token that is looked at, next token], in logits.

    Raises:
        DataError: if there is no such head.
        InexactError: if the norm before the head or the final norm is live, or the logits are
            capped.
        UnsupportedModelError: for a model whose stream has other parts, or with norms on queries
            and keys.

    Source:
        The OV circuit: Elhage et al. 2021, https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> table = lf.ov_table(free, layer=2, head=5)
        >>> table
        TokenTable(logit from a token that L2H5 looks at, 4096 x 4096, rank 32 at most)
        >>> table.top(3, row=" in").columns.tolist()
        ['row', 'column', 'value']
    """
    require_head(model, layer, head)
    name = f"L{layer}H{head}"
    left = model.W_E @ reader_weights(model, name, "V")
    right = writer_weights(model, name) @ reader_weights(model, "b_U")
    return TokenTable(left, right, f"logit from a token that {name} looks at", model)


@torch.no_grad()
def qk_table(
    model: HookedTransformer, layer: int, head: int, offset: int | None = None
) -> TokenTable:
    """How much a token's embedding at the query looks for each at the key: scores, pre-softmax.

    Positions that are added to the stream and biases are not in it, nor what else is in the stream.

    Args:
        model: LN-free.
        layer: Of the head.
        head: Its index.
        offset: How many positions the key is behind; needed where positions are rotary, and
            without effect elsewhere.

    Returns:
        Table [token at the query, token at the key], in units of the score.

    Raises:
        DataError: if there is no such head, or an offset is needed.
        InexactError: if the norm before the head is live.
        UnsupportedModelError: if scores are capped, so that no table gives them; for a model whose
            stream has other parts, or with norms on queries and keys.

    Source:
        The QK circuit: Elhage et al. 2021, https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> lf.qk_table(free, layer=2, head=5)
        TokenTable(score of L2H5, embedding to embedding, 4096 x 4096, rank 32 at most)
        >>> lf.qk_table(free, layer=2, head=5).column(" in").shape
        torch.Size([4096])
    """
    require_head(model, layer, head)
    if model.cfg.attn_scores_soft_cap > 0:
        raise UnsupportedModelError("scores are capped: they are no sum of token by token entries")
    attn, name = model.blocks[layer].attn, f"L{layer}H{head}"
    q = model.W_E @ reader_weights(model, name, "Q")
    k = model.W_E @ reader_weights(model, name, "K")
    if model.cfg.positional_embedding_type == "rotary":
        if offset is None or not 0 <= offset < model.cfg.n_ctx:
            raise DataError("positions are rotary: say how far behind the key is, offset=0 or more")
        q = attn.apply_rotary(q[:, None, None], past_kv_pos_offset=offset)[:, 0, 0]
        k = attn.apply_rotary(k[:, None, None])[:, 0, 0]
    what = f"score of {name}, embedding to embedding"
    return TokenTable(q / attn.attn_scale, k.T, what, model)


@torch.no_grad()
def neuron_input_table(model: HookedTransformer, layer: int) -> TokenTable:
    """What each token's embedding adds to the input of each neuron of a layer: W_E W_in.

    In a gated MLP, to the input of its gate: W_E W_gate. Positions and biases are not in it.

    Args:
        model: LN-free; of the norms only the one before the MLP matters.
        layer: Of the MLP.

    Returns:
        Table [token, neuron], in units of the neuron's input.

    Raises:
        InexactError: if the norm before the MLP is live.
        DataError: if the layer has no MLP.
        UnsupportedModelError: for a model whose stream has other parts.

    Source:
        Neurons as keys: arXiv 2012.14913. Read off the embeddings, as the framework of Elhage et
        al. 2021 reads off heads, https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> lf.neuron_input_table(free, layer=1)
        TokenTable(input of layer 1's neurons, 4096 x 768, rank 192 at most)
        >>> lf.neuron_input_table(free, layer=1).column(7).shape
        torch.Size([4096])
    """
    right = reader_weights(model, Component("mlp_out", layer))
    what = f"input of layer {layer}'s neurons"
    return TokenTable(model.W_E.detach(), right, what, model, tokens_in_columns=False)


@torch.no_grad()
def neuron_output_table(model: HookedTransformer, layer: int) -> TokenTable:
    """What each neuron of a layer adds to each logit per unit of activation: W_out W_U.

    Directly: what later blocks make of it is not in it.

    Args:
        model: LN-free; of the norms only the final one matters.
        layer: Of the MLP.

    Returns:
        Table [neuron, next token], in logits per unit of activation.

    Raises:
        InexactError: if the final norm is live or the logits are capped.
        DataError: if the layer has no MLP.
        UnsupportedModelError: for a model whose stream has other parts.

    Source:
        What neurons write in vocabulary space: arXiv 2203.14680.

    Examples:
        >>> table = lf.neuron_output_table(free, layer=1)
        >>> table
        TokenTable(logit per neuron of layer 1, 768 x 4096, rank 192 at most)
        >>> table.top(3, row=7)["row"].tolist()
        [7, 7, 7]
    """
    left = writer_weights(model, Component("mlp_out", layer))
    right = reader_weights(model, "b_U")
    return TokenTable(
        left, right, f"logit per neuron of layer {layer}", model, tokens_in_rows=False
    )
