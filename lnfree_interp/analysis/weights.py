"""What the weights alone say: without norms, products of weights are what the model computes.

A writer (a head's W_O, a neuron's row of W_out, an embedding) and a reader (a head's W_Q, W_K or
W_V, a neuron's column of W_in, the unembedding) meet in the stream; their product does not depend
on the input. With a live norm it would, by a factor for every token, so live norms are refused.
Everything is kept factored: nothing of size d_vocab x d_vocab is formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import FactoredMatrix

from lnfree_interp.analysis.components import Component, as_component
from lnfree_interp.analysis.prompts import Answer, read_answers, whole_number
from lnfree_interp.analysis.results import read_top
from lnfree_interp.analysis.targets import require_head
from lnfree_interp.analysis.view import Model, Read, View, view_of
from lnfree_interp.errors import DataError, UnsupportedModelError

Input = Literal["Q", "K", "V"]


def writer_weights(view: View, component: str | Component) -> Float[Tensor, "width d_model"]:
    """What a component writes with: W_O of a head, a row of W_out, all of W_E or W_pos, a bias.

    Raises:
        DataError: if the model has no such component, or it is none of these.
    """
    one = as_component(component)
    if one.pos is not None or one.through:
        raise DataError(f"{one.label}: weights are the same at every position and on every path")
    if one.layer is not None and not 0 <= one.layer < view.n_layers:
        raise DataError(f"{one.label}: the model has layers 0 to {view.n_layers - 1}")
    if one.kind == "embed":
        return view.W_E
    if one.kind == "pos_embed" and view.has_positions:
        return view.W_pos
    if one.layer is not None and one.kind == "head" and one.index is not None:
        require_head(view, one.layer, one.index)
        return view.attention(one.layer).W_O[one.index]
    if one.layer is not None and one.kind == "b_O":
        return view.attention(one.layer).b_O[None]
    if one.layer is not None and view.has_mlps:
        mlp = view.mlp(one.layer)
        if one.kind == "neuron" and one.index is not None:
            n_neurons = mlp.W_out.shape[0]
            if not 0 <= one.index < n_neurons:
                raise DataError(f"{one.label}: layer {one.layer} has neurons 0 to {n_neurons - 1}")
            return mlp.W_out[one.index][None]
        if one.kind == "mlp_out":
            return mlp.W_out
        if one.kind == "b_out":
            return mlp.b_out[None]
    raise DataError(f"{one.label} writes with no weights of its own in this model")


def _through(norm: Read, W: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
    """A reader's weights with its norm, which is constant, merged in."""
    return norm.weights_back(W) / norm.scale


def reader_weights(
    view: View, component: str | Component, which: Input | None = None
) -> Float[Tensor, "d_model width"]:
    """What a component reads the stream with, its norm merged in.

    Args:
        view: Of an LN-free model.
        component: A head (`"L2H5"`, with `which`), a neuron (`"L2N310"`; the input of its
            activation function), a layer's MLP (`"2_mlp_out"`), or `"b_U"` for the unembedding.
        which: Of a head: `"Q"`, `"K"` or `"V"`.

    Raises:
        DataError: if the model has no such component, or it does not read.
        InexactError: if the norm is live.
    """
    one = as_component(component)
    if one.kind == "b_U":
        return _through(view.constant_read("ln_final", logits=True), view.W_U)
    writer_weights(view, one)  # exists
    if one.kind == "head" and one.layer is not None and one.index is not None:
        if which not in ("Q", "K", "V"):
            raise DataError(f"say with which of Q, K and V {one.label} reads")
        site = f"blocks.{one.layer}.ln1.{'v' if which == 'V' else 'qk'}"
        W = getattr(view.attention(one.layer), f"W_{which}")[one.index]
        return _through(view.constant_read(site), W)
    if one.kind in ("neuron", "mlp_out") and one.layer is not None:
        W, _ = view.mlp(one.layer).before_activation
        W = W if one.index is None else W[:, one.index][:, None]
        return _through(view.constant_read(f"blocks.{one.layer}.ln2"), W)
    raise DataError(f"{one.label} does not read the stream")


@torch.no_grad()
def virtual_weights(
    model: Model,
    writer: str | Component,
    reader: str | Component,
    which: Input | None = None,
) -> FactoredMatrix:
    """From what a component holds to what a later one reads of it: W_write W_read.

    Head to head, by `which`: [d_head, d_head]. It is the whole direct effect of the one on the
    other, for every input: with z of the writer at a position, its share of the reader's query, key
    or value there, before any rotation, is z times this. Biases are not in it.

    Args:
        model: LN-free, a `HookedTransformer` or a `TransformerBridge`.
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
    view, one, two = view_of(model), as_component(writer), as_component(reader)
    if one.layer is not None and two.layer is not None:
        same_block = one.layer == two.layer and two.kind in ("neuron", "mlp_out")
        same_block = same_block and one.kind in ("head", "b_O") and not view.parallel
        if not (one.layer < two.layer or same_block):
            raise DataError(f"{two.label} does not come after {one.label}: it cannot read it")
    return FactoredMatrix(writer_weights(view, one), reader_weights(view, two, which))


@dataclass(frozen=True, eq=False, repr=False)
class TokenTable:
    """A table over tokens that is kept as two factors.

    Attributes:
        left: [row, rank], whose product with `right` is the table, in the unit of `what`.
        right: [rank, column].
        what: What an entry is, in words.
        view: Of the model whose tokens they are.
        tokens_in_rows: Whether rows are tokens; else they are numbers.
        tokens_in_columns: The same of columns.
    """

    left: Float[Tensor, "row rank"]
    right: Float[Tensor, "rank column"]
    what: str
    view: View
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
            return int(read_answers(self.view, name, 1, True, "token")[0])
        number = whole_number(name, "a row or column of this table")
        if not -size <= number < size:
            raise DataError(f"rows here are numbers from 0 to {size - 1}, not {number}")
        return number

    def top(
        self,
        k: SupportsIndex = 20,
        row: Answer | None = None,
        smallest: bool = False,
        chunk: SupportsIndex = 1024,
        progress: bool = True,
    ) -> pd.DataFrame:
        """The largest entries, of one row or of the whole table: `row`, `column`, `value`.

        Args:
            k: How many.
            row: Only this one.
            smallest: The most negative instead.
            chunk: Rows formed at once.
            progress: Whether to show a progress bar where it takes more than a second.

        Raises:
            DataError: if there is no such row, or `k` or `chunk` is less than one.
        """
        k, chunk = read_top(k, self.shape[0] * self.shape[1]), whole_number(chunk, "chunk")
        if chunk < 1:
            raise DataError(f"chunk={chunk}: give how many rows to form at once, at least 1")
        first, n_rows = 0, len(self.left)
        if row is not None:
            first, n_rows = self._index(row, self.tokens_in_rows, len(self.left)) % n_rows, 1
        sign, width = (-1 if smallest else 1), self.shape[1]
        best = self.left.new_empty(0)
        places = torch.empty(0, dtype=torch.long, device=self.left.device)
        starts = range(first, first + n_rows, chunk)
        for start in tqdm(starts, desc="table", unit="chunk", delay=1, disable=not progress):
            left = sign * self.left[start : min(start + chunk, first + n_rows)]
            values = left @ self.right
            # Most rows hold nothing that could still be among the k: one pass finds that out.
            floor = best[-1] if len(best) == k else values.new_tensor(-torch.inf)
            rows = (values.amax(1) > floor).nonzero()[:, 0]
            if len(best) and not len(rows):
                continue
            found = values[rows].flatten().topk(min(k, len(rows) * width))
            at = (rows[found.indices // width] + start) * width + found.indices % width
            merged = torch.cat([best, found.values])
            order = merged.topk(min(k, len(merged))).indices
            best, places = merged[order], torch.cat([places, at])[order]
        found_at = places.tolist()
        return pd.DataFrame(
            {
                "row": self._names([place // width for place in found_at], self.tokens_in_rows),
                "column": self._names(
                    [place % width for place in found_at], self.tokens_in_columns
                ),
                "value": (sign * best).tolist(),
            }
        )

    def _names(self, ids: Sequence[int], tokens: bool) -> list[str] | list[int]:
        return self.view.strings(ids) if tokens else list(ids)


@torch.no_grad()
def bigram_table(model: Model) -> TokenTable:
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
    view = view_of(model)
    return TokenTable(view.W_E, reader_weights(view, "b_U"), "logit from the embedding", view)


@torch.no_grad()
def ov_table(model: Model, layer: SupportsIndex, head: SupportsIndex) -> TokenTable:
    """What looking at a token's embedding adds to each logit: W_E W_V W_O W_U, in logits.

    For an attention weight of one. Positions and biases are not in it, nor what else is in the
    stream.

    Args:
        model: LN-free, a `HookedTransformer` or a `TransformerBridge`.
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
    view = view_of(model)
    layer, head = require_head(view, layer, head)
    name = f"L{layer}H{head}"
    left = view.W_E @ reader_weights(view, name, "V")
    right = writer_weights(view, name) @ reader_weights(view, "b_U")
    return TokenTable(left, right, f"logit from a token that {name} looks at", view)


@torch.no_grad()
def qk_table(
    model: Model, layer: SupportsIndex, head: SupportsIndex, offset: int | None = None
) -> TokenTable:
    """How much a token's embedding at the query looks for each at the key: scores, pre-softmax.

    Positions that are added to the stream and biases are not in it, nor what else is in the stream.

    Args:
        model: LN-free, a `HookedTransformer` or a `TransformerBridge`.
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
    view = view_of(model)
    layer, head = require_head(view, layer, head)
    if view.score_cap > 0:
        raise UnsupportedModelError("scores are capped: they are no sum of token by token entries")
    name = f"L{layer}H{head}"
    q = view.W_E @ reader_weights(view, name, "Q")
    k = view.W_E @ reader_weights(view, name, "K")
    if view.rotary:
        behind = -1 if offset is None else whole_number(offset, "an offset")
        if not 0 <= behind < view.cfg.n_ctx:
            raise DataError("positions are rotary: say how far behind the key is, offset=0 or more")
        turn = view.rotations(layer, behind + 1)
        q, k = q @ turn[behind], k @ turn[0]
    what = f"score of {name}, embedding to embedding"
    return TokenTable(q / view.attention(layer).scale, k.T, what, view)


@torch.no_grad()
def neuron_input_table(model: Model, layer: SupportsIndex) -> TokenTable:
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
    view = view_of(model)
    right = reader_weights(view, Component("mlp_out", whole_number(layer, "a layer")))
    what = f"input of layer {layer}'s neurons"
    return TokenTable(view.W_E, right, what, view, tokens_in_columns=False)


@torch.no_grad()
def neuron_output_table(model: Model, layer: SupportsIndex) -> TokenTable:
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
    view = view_of(model)
    left = writer_weights(view, Component("mlp_out", whole_number(layer, "a layer")))
    right = reader_weights(view, "b_U")
    return TokenTable(left, right, f"logit per neuron of layer {layer}", view, tokens_in_rows=False)
