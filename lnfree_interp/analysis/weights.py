"""Analyses of weights alone: without norms, products of weights are what the model computes.

A writer (a head's W_O, a neuron's row of W_out, an embedding) and a reader (a head's W_Q, W_K or
W_V, a neuron's column of W_in, the unembedding) meet in the stream, and their product does not
depend on the input. With a live norm it would, by a factor for every token, so live norms raise an
error. Everything is kept factored: nothing of size d_vocab x d_vocab is formed.
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
from lnfree_interp.analysis.positions import whole_number
from lnfree_interp.analysis.prompts import Answer, read_answers
from lnfree_interp.analysis.results import read_top
from lnfree_interp.analysis.score_targets import require_head
from lnfree_interp.analysis.stream import Read
from lnfree_interp.analysis.view import Model, Side, View, view_of
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.numerics import own_precision

Input = Literal["Q", "K", "V"]
_SIDES: dict[Input, Side] = {"Q": "query", "K": "key"}


def writer_weights(view: View, component: str | Component) -> Float[Tensor, "width d_model"]:
    """The weights that a component writes with: a head's W_O, a row of W_out, W_E, W_pos or a bias.

    Raises:
        DataError: if the model has no such component, or it has no such weights.
    """
    one = as_component(component)
    if one.pos is not None or one.through:
        raise DataError(
            f"{one.label}: weights are the same at every position and on every path: give the "
            "label without them"
        )
    if one.layer is not None and not 0 <= one.layer < view.n_layers:
        raise DataError(f"there is no {one.label}: the model has layers 0 to {view.n_layers - 1}")
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
                raise DataError(
                    f"there is no {one.label}: layer {one.layer} has neurons 0 to {n_neurons - 1}"
                )
            return mlp.W_out[one.index][None]
        if one.kind == "mlp_out":
            return mlp.W_out
        if one.kind == "b_out":
            return mlp.b_out[None]
    raise DataError(
        f"{one.label} writes with no weights of its own in this model: give a head (L2H5), a "
        "neuron (L2N310), an MLP (2_mlp_out), embed, pos_embed, 2_b_O or 2_b_out"
    )


def _through(norm: Read, W: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
    """A reader's weights with the constant norm before them merged in."""
    return norm.weights_back(W) / norm.scale


def reader_weights(
    view: View, component: str | Component, which: Input | None = None
) -> Float[Tensor, "d_model width"]:
    """The weights that a component reads the stream with, its norm merged in.

    Args:
        view: The view of an LN-free model.
        component: A head (`"L2H5"`, with `which`), a neuron (`"L2N310"`; the input of its
            activation function), a layer's MLP (`"2_mlp_out"`), or `"b_U"` for the unembedding.
        which: What a head reads for: `"Q"`, `"K"` or `"V"`.

    Raises:
        DataError: if the model has no such component, or it does not read the stream.
        InexactError: if the norm is live.
    """
    one = as_component(component)
    if one.kind == "b_U":
        return _through(view.constant_read("ln_final", logits=True), view.W_U)
    writer_weights(view, one)  # raises an error if there is no such component
    if one.kind == "head" and one.layer is not None and one.index is not None:
        if which not in ("Q", "K", "V"):
            raise DataError(
                f"say with which of Q, K and V {one.label} reads: give which='Q', 'K' or 'V'"
            )
        site = f"blocks.{one.layer}.ln1.{'v' if which == 'V' else 'qk'}"
        W = getattr(view.attention(one.layer), f"W_{which}")[one.index]
        behind = None if which == "V" else view.qk_norm(one.layer, _SIDES[which])
        W = W if behind is None else view.constant_read(behind).forward(W)
        return _through(view.constant_read(site), W)
    if one.kind in ("neuron", "mlp_out") and one.layer is not None:
        W, _ = view.mlp(one.layer).before_activation
        W = W if one.index is None else W[:, one.index][:, None]
        return _through(view.constant_read(f"blocks.{one.layer}.ln2"), W)
    raise DataError(
        f"{one.label} does not read the stream: give a head (L2H5), a neuron (L2N310), an MLP "
        "(2_mlp_out), or b_U for the unembedding"
    )


@own_precision
def virtual_weights(
    model: Model,
    writer: str | Component,
    reader: str | Component,
    which: Input | None = None,
) -> FactoredMatrix:
    """The weights between two components: what one writes with times what a later one reads with.

    From head to head it is [d_head, d_head], the whole direct effect of one on the other, for every
    input: where the writer has z at a position, its share of the reader's query, key or value
    there, before any rotation, is z times this matrix. Biases are not included.

    Args:
        model: An LN-free `HookedTransformer` or `TransformerBridge`.
        writer: `"L0H3"`, `"L0N12"`, `"0_mlp_out"`, `"embed"`, `"pos_embed"`, `"0_b_O"`.
        reader: A head (`"L2H5"`, with `which`), a neuron (`"L2N310"`; the input of its activation
            function), a layer's MLP (`"2_mlp_out"`), or `"b_U"` for the unembedding.
        which: What a reading head reads for: `"Q"`, `"K"` or `"V"`.

    Returns:
        The factored matrix [width of the writer, width of the reader]: what the reader gets per
        unit of the writer's activation. A width is d_head, 1 for a neuron or a bias, or the number
        of an MLP's neurons, of tokens or of positions.

    Raises:
        DataError: if the reader does not come after the writer, either does not exist, or a head
            reads without `which`.
        InexactError: if the reader's norm is live, or the logits that it reads are capped.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts, or a
            `TransformerBridge` with norms on queries and keys whose weights would be read.

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
            raise DataError(
                f"{two.label} does not come after {one.label}, so it cannot read it: give the "
                "writer first"
            )
    return FactoredMatrix(writer_weights(view, one), reader_weights(view, two, which))


@dataclass(frozen=True, eq=False, repr=False)
class TokenTable:
    """A table over tokens that is kept as two factors.

    Attributes:
        left: [row, rank]; its product with `right` is the table, in the unit of `what`.
        right: [rank, column], the other factor.
        what: What an entry is, in words.
        view: The view of the model whose tokens the table is about.
        tokens_in_rows: Whether rows are tokens; if not, they are numbers.
        tokens_in_columns: Whether columns are tokens; if not, they are numbers.
    """

    left: Float[Tensor, "row rank"]
    right: Float[Tensor, "rank column"]
    what: str
    view: View
    tokens_in_rows: bool = True
    tokens_in_columns: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns."""
        return (len(self.left), self.right.shape[1])

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"TokenTable({self.what}, {rows} x {columns}, rank {self.left.shape[1]} at most)"

    @property
    def matrix(self) -> FactoredMatrix:
        """The table for TransformerLens' own tools: singular values, eigenvalues, norms."""
        return FactoredMatrix(self.left, self.right)

    @own_precision
    def row(self, name: Answer) -> Float[Tensor, " column"]:
        """[column], one row, by token or number.

        Raises:
            DataError: if there is no such row.
        """
        return self.left[self._index(name, self.tokens_in_rows, len(self.left))] @ self.right

    @own_precision
    def column(self, name: Answer) -> Float[Tensor, " row"]:
        """[row], one column, by token or number.

        Raises:
            DataError: if there is no such column.
        """
        return self.left @ self.right[:, self._index(name, self.tokens_in_columns, self.shape[1])]

    @own_precision
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
            raise DataError(
                f"rows or columns here are numbers from 0 to {size - 1}, and {number} was given"
            )
        return number

    @own_precision
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
            k: How many entries to list.
            row: A token or number, to list entries of that row only.
            smallest: Whether to list the most negative entries instead.
            chunk: How many rows are formed at once.
            progress: Whether to show a progress bar if it takes more than a second.

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
            # Most rows have no entry that could still be among the k; one pass finds these rows.
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


def _named(view: View, what: str, *sites: str) -> str:
    """What a table is about; it says so where the first token of a prompt has other constants."""
    apart = any(view.scale_hook(site) is not None for site in sites)
    return f"{what}, not of a prompt's first token" if apart else what


@own_precision
def bigram_table(model: Model) -> TokenTable:
    """What a token's embedding alone adds to each next token's logit: W_E W_U, in logits.

    This is the direct path only: positions, biases, heads and MLPs are not included.

    Args:
        model: A model whose final norm is removed or frozen; its other norms do not matter.

    Returns:
        Table [token, next token], in logits.

    Raises:
        InexactError: if the final norm is live or the logits are capped.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Elhage et al. 2021, https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> lf.bigram_table(free)
        TokenTable(logit from the embedding, 4096 x 4096, rank 192 at most)
        >>> lf.bigram_table(free).row(" in").shape
        torch.Size([4096])
    """
    view = view_of(model)
    what = _named(view, "logit from the embedding", "ln_final")
    return TokenTable(view.W_E, reader_weights(view, "b_U"), what, view)


@own_precision
def ov_table(model: Model, layer: SupportsIndex, head: SupportsIndex) -> TokenTable:
    """What looking at a token's embedding adds to each logit: W_E W_V W_O W_U, in logits.

    It is for an attention weight of one. Positions, biases and whatever else is in the stream are
    not included.

    Args:
        model: An LN-free `HookedTransformer` or `TransformerBridge`.
        layer: The head's layer, counted from 0.
        head: The head's index in its layer, counted from 0.

    Returns:
        Table [token that is looked at, next token], in logits.

    Raises:
        DataError: if there is no such head.
        InexactError: if the norm before the head or the final norm is live, or the logits are
            capped.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

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
    what = f"logit from a token that {name} looks at"
    what = _named(view, what, f"blocks.{layer}.ln1.v", "ln_final")
    return TokenTable(left, right, what, view)


@own_precision
def qk_table(
    model: Model, layer: SupportsIndex, head: SupportsIndex, offset: int | None = None
) -> TokenTable:
    """The attention score of each token's embedding at the query with each at the key.

    Scores are those before the softmax. Positions that are added to the stream, biases and whatever
    else is in the stream are not included.

    Args:
        model: An LN-free `HookedTransformer` or `TransformerBridge`.
        layer: The head's layer, counted from 0.
        head: The head's index in its layer, counted from 0.
        offset: By how many positions the key comes before the query; needed where positions are
            rotary, and without effect otherwise.

    Returns:
        Table [token at the query, token at the key], in units of the score.

    Raises:
        DataError: if there is no such head, or an offset is needed.
        InexactError: if the norm before the head is live, or one on its queries or keys.
        UnsupportedModelError: if scores are capped, or the block's attention is linear, so that no
            table gives them; for a model whose stream is not the plain sum of its parts, or a
            `TransformerBridge` with norms on queries and keys.

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
    view.require_softmax(layer)
    if view.score_cap > 0:
        raise UnsupportedModelError(
            "attention scores of this model are capped, so they are no sum of entries for pairs of "
            "tokens: use lf.attribute_scores on a trace that holds"
        )
    name = f"L{layer}H{head}"
    q = view.W_E @ reader_weights(view, name, "Q")
    k = view.W_E @ reader_weights(view, name, "K")
    if view.rotary:
        behind = -1 if offset is None else whole_number(offset, "an offset")
        if not 0 <= behind < view.cfg.n_ctx:
            raise DataError(
                "positions are rotary, so the table depends on the distance: say how far behind "
                "the key is, with offset=0 or more, less than the context"
            )
        turn = view.rotations(layer, behind + 1)
        q, k = q @ turn[behind], k @ turn[0]
    what = _named(view, f"score of {name}, embedding to embedding", f"blocks.{layer}.ln1.qk")
    return TokenTable(q / view.attention(layer).scale, k.T, what, view)


@own_precision
def neuron_input_table(model: Model, layer: SupportsIndex) -> TokenTable:
    """What each token's embedding adds to the input of each neuron of a layer: W_E W_in.

    In a gated MLP it is the input of the gate: W_E W_gate. Positions and biases are not included.

    Args:
        model: A model whose norm before the MLP is removed or frozen; the others do not matter.
        layer: The MLP's layer, counted from 0.

    Returns:
        Table [token, neuron], in units of the neuron's input.

    Raises:
        InexactError: if the norm before the MLP is live.
        DataError: if the layer has no MLP.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Neurons as keys: arXiv 2012.14913. Reading them off the embeddings, as is done for heads:
        Elhage et al. 2021, https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> lf.neuron_input_table(free, layer=1)
        TokenTable(input of layer 1's neurons, 4096 x 768, rank 192 at most)
        >>> lf.neuron_input_table(free, layer=1).column(7).shape
        torch.Size([4096])
    """
    view = view_of(model)
    right = reader_weights(view, Component("mlp_out", whole_number(layer, "a layer")))
    what = _named(view, f"input of layer {layer}'s neurons", f"blocks.{layer}.ln2")
    return TokenTable(view.W_E, right, what, view, tokens_in_columns=False)


@own_precision
def neuron_output_table(model: Model, layer: SupportsIndex) -> TokenTable:
    """What each neuron of a layer adds to each logit per unit of activation: W_out W_U.

    This is the direct effect only: what later blocks add is not included.

    Args:
        model: A model whose final norm is removed or frozen; its other norms do not matter.
        layer: The MLP's layer, counted from 0.

    Returns:
        Table [neuron, next token], in logits per unit of activation.

    Raises:
        InexactError: if the final norm is live or the logits are capped.
        DataError: if the layer has no MLP.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

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
    what = _named(view, f"logit per neuron of layer {layer}", "ln_final")
    return TokenTable(left, right, what, view, tokens_in_rows=False)
