"""Banks of norms: for each domain, all that norms learn, over one model that all domains share.

A domain starts from the bank of the one before, is trained alone, and is never changed again. Which
bank a sequence of unknown domain gets is decided by its feature in the frozen model. (LN tuning for
continual learning, arXiv 2308.09610, whose domains are tasks on images)
"""

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import read_sequences
from lnfree_interp.checkpoints import bank_folder
from lnfree_interp.checkpoints.adapter import BASE
from lnfree_interp.data.sequences import TokenSequences
from lnfree_interp.errors import DataError, RecipeError, UnsupportedModelError
from lnfree_interp.models.forms import fold
from lnfree_interp.models.running import require_hooked, run
from lnfree_interp.models.sites import has_norm_sites, stock_weights, untie, with_norm_sites
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.training import RunOptions, finetune
from lnfree_interp.tuning.bank_evaluation import BankEvaluation, evaluate_banks
from lnfree_interp.tuning.bank_head import grouped, require_plain, train_unembedding
from lnfree_interp.tuning.bank_keys import Keys, key_of, sequence_features
from lnfree_interp.tuning.selection import chosen_by, parameters_of, select_parameters

Texts = Mapping[str, Int[Tensor, "_sequence _pos"]]
"""Packed text by domain."""


class NormBanks:
    """The norms of a model, once for each domain; all else is shared.

    A bank has the gains and biases of all norms, and what else they learn, such as the alphas of
    curves; a frozen norm keeps the model's constant. `"base"` names the model below all banks.

    Examples:
        >>> banks = lf.NormBanks.of(model)
        >>> recipe = lf.recipes.finetuning(steps=2, batch=2)
        >>> run = banks.train("python", tokens, recipe, progress=False)
        >>> banks
        NormBanks(python; 3,456 numbers each)
        >>> banks.fit_keys({"python": tokens})
        >>> banks.select(tokens)
        ['python', 'python', 'python', 'python']
        >>> folder = banks.save("banks", lf.bundled_checkpoint())
        >>> tuned = lf.load(folder, bank="python")
        >>> lf.compare_logits(tuned, banks.model("python"), tokens).absolute
        0.0
    """

    def __init__(
        self,
        shared: HookedTransformer,
        banks: Mapping[str, Mapping[str, Tensor]] | None = None,
        keys: Keys | None = None,
    ):
        """Use `NormBanks.of` or `NormBanks.load`.

        Args:
            shared: With norm sites; kept, not copied.
            banks: What norms learnt, by domain and parameter.
            keys: Where domains are told apart, and by what.
        """
        self._shared = shared
        self._names = tuple(select_parameters(shared, "norms").chosen)
        self._banks = {domain: dict(bank) for domain, bank in (banks or {}).items()}
        self._keys = keys

    @classmethod
    def of(cls, model: HookedTransformer) -> "NormBanks":
        """No banks yet, over a copy of a model.

        Args:
            model: Stock, or with norm sites, live or frozen.

        Raises:
            UnsupportedModelError: if its norms have no gains and biases of their own.
        """
        require_hooked(model)
        if not has_norm_sites(model) and model.cfg.normalization_type not in ("LN", "RMS"):
            raise UnsupportedModelError(
                "the gains and biases of this model's norms are folded into its weights, so there "
                "is nothing of a bank to train: give it as the run left it, run.model, or load its "
                "export with lf.load(FOLDER, form='sites'). A bank comes into the folded form "
                "behind: lf.fold(banks.model(...)), banks.patch(...), lf.load(BANKS, bank=..., "
                "form='folded')"
            )
        return cls(with_norm_sites(model))

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that have a bank, in the order of their training."""
        return tuple(self._banks)

    def train(
        self,
        domain: str,
        data: TokenSequences | Int[Tensor, "sequence pos"],
        recipe: Recipe,
        *,
        start: str | None = None,
        **options: Unpack[RunOptions],
    ) -> Run:
        """Train the bank of a new domain, and nothing else.

        Args:
            domain: Its name.
            data: Packed text, as for `lf.finetune`.
            recipe: Such as `lf.recipes.finetuning(...)`. Its `trainable` is `"norms"` here, unless
                it names some of them, such as `"norms:ln2"`.
            start: The bank to start from. Default: that of the domain before; `"base"` for none.
            **options: As for `lf.finetune`. With `out`, a run that was interrupted goes on by the
                same call with `resume=True`. Weights are always copied.

        Returns:
            The `Run` of `lf.finetune`.

        Raises:
            DataError: if there is no text, the name cannot be one, or there is no bank to start
                from.
            RecipeError: if the domain has a bank, or the recipe trains other than norms.
            LnfreeError: for what `lf.finetune` refuses.

        Source:
            arXiv 2308.09610, stage 1.
        """
        self._require_new(domain)
        _require_text(domain, data)
        options["copy_weights"] = True  # those that domains share are not to be touched
        trained = finetune(self.model(start), self._of_norms(recipe), data, **options)
        after = stock_weights(trained.model)
        self._banks[domain] = {name: after[name].clone() for name in self._names}
        return trained

    def model(self, domain: str | None = None) -> HookedTransformer:
        """The model with a domain's bank, its norms live or frozen as those below are.

        Args:
            domain: A domain, or `"base"`. Default: the last one that was trained, from which the
                next one starts.

        Returns:
            With norm sites, whose gains and biases are its own; all other weights are shared with
                the other domains' models. `lf.fold` and `lf.frozen_form` finish it.

        Raises:
            DataError: if there is no such domain.
        """
        bank = self._bank((self.domains or (BASE,))[-1] if domain is None else domain)
        made = _copied(self._shared, {*self._names})
        places = stock_weights(made)
        for name, W in bank.items():
            places[name].copy_(W)
        return made.eval()

    def patch(self, domain: str) -> dict[str, Float[Tensor, "*shape"]]:
        """A domain's bank as what it adds to the weights of the folded model.

        Args:
            domain: A domain.

        Returns:
            By parameter of `lf.fold(banks.model("base"))`, what makes it
                `lf.fold(banks.model(domain))`; parameters that stay are left out.

        Raises:
            DataError: if there is no such domain.
            NormSiteError: if norms are live, or cannot be folded.
        """
        after, before = (stock_weights(fold(self.model(one))) for one in (domain, BASE))
        return {n: W - before[n] for n, W in after.items() if not torch.equal(W, before[n])}

    def fit_keys(self, texts: Texts, *, layer: int | None = None, batch: int = 16) -> None:
        """Make the key of each domain, by which `select` knows its sequences.

        Keys are of the model below the banks, which never changes, so that those of other domains
        stay when one is added.

        Args:
            texts: By domain, packed text of the kind that it was trained on.
            layer: The stream before this block is averaged over a sequence's tokens. Default: that
                of the keys there are; for the first, the middle of the model.
            batch: How many sequences run at once.

        Raises:
            DataError: if a domain has no bank or no text, or there is no such layer, or there are
                keys of another one.

        Source:
            arXiv 2308.09610: the cosine with features of the frozen model.
        """
        kept = {} if self._keys is None else dict(self._keys.of)
        before = self._shared.cfg.n_layers // 2 if self._keys is None else self._keys.layer
        layer = before if layer is None else layer
        if not 0 <= layer <= self._shared.cfg.n_layers:
            raise DataError(f"layer={layer}: give 0 to {self._shared.cfg.n_layers}")
        if layer != before and kept.keys() - texts.keys():
            raise DataError(
                f"the other keys are of layer {before}: leave out layer, or give the text of all "
                f"of {', '.join(kept)}"
            )
        for domain, tokens in self._texts(texts).items():
            kept[domain] = key_of(sequence_features(self._shared, tokens, layer, batch))
        self._keys = Keys(layer, kept)

    def similarity(
        self, tokens: Int[Tensor, "sequence pos"], *, batch: int = 16
    ) -> Float[Tensor, "sequence domain"]:
        """The cosine of each sequence's feature with each domain's key, in float64.

        Args:
            tokens: Sequences of one length.
            batch: How many run at once.

        Raises:
            DataError: if a domain has no key, or the model cannot read the tokens.
        """
        keys = {} if self._keys is None else self._keys.of
        missing = [domain for domain in self.domains if domain not in keys]
        if missing or self._keys is None:
            which = ", ".join(missing) or "none of the domains, of which there are none"
            raise DataError(
                f"no key is fitted for {which}: call banks.fit_keys with text of every domain"
            )
        tokens = read_sequences(self._shared, tokens, packed=True)
        features = sequence_features(self._shared, tokens, self._keys.layer, batch)
        return self._keys.similarity(features, self.domains)

    def select(self, tokens: Int[Tensor, "sequence pos"], *, batch: int = 16) -> list[str]:
        """The domain of each sequence: the one whose key is the most similar.

        Args:
            tokens: Sequences of one length.
            batch: How many run at once; a sequence's domain does not depend on the others.

        Raises:
            DataError: if a domain has no key, or the model cannot read the tokens.
        """
        chosen = self.similarity(tokens, batch=batch).argmax(1)
        return [self.domains[i] for i in chosen.tolist()]

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "sequence pos"], domains: Sequence[str] | None = None
    ) -> Float[Tensor, "sequence pos d_vocab"]:
        """Logits of sequences of different domains, each with its own bank.

        Sequences of a domain run together, so that they are bit for bit those of
        `banks.model(domain)` on these sequences.

        Args:
            tokens: Sequences of one length.
            domains: The domain of each. Default: `select(tokens)`.

        Raises:
            DataError: if there is no such domain, or not one for each sequence.
        """
        tokens = read_sequences(self._shared, tokens, packed=True)
        domains = self.select(tokens) if domains is None else list(domains)
        if len(domains) != len(tokens):
            raise DataError(f"{len(domains)} domains for {len(tokens)} sequences: give one each")
        out: Tensor | None = None
        for domain, rows in grouped(list(range(len(tokens))), domains.__getitem__).items():
            found = run(self.model(domain), tokens[rows])
            out = found.new_empty(len(tokens), *found.shape[1:]) if out is None else out
            out[rows] = found
        assert out is not None
        return out

    def train_head(
        self, texts: Texts, recipe: Recipe, *, progress: bool = True
    ) -> tuple[float, ...]:
        """Train the unembedding that all domains share, with the banks that `select` gives.

        The second stage of the paper, which makes up for sequences that get another domain's bank.
        W_U is untied from W_E where it was tied, and b_U is trained where the architecture has one.
        From then on it belongs to what domains share, so the logits of all domains change here, and
        only here.

        Args:
            texts: Packed text by domain; sequences of all are mixed.
            recipe: Such as `lf.recipes.finetuning(...)`; steps, batch, rates, decay, clipping and
                seed are read.
            progress: Whether to show a progress bar.

        Returns:
            The loss of each step, in nats per token.

        Raises:
            DataError: if a domain has no bank, no key or no text.
            RecipeError: if the recipe asks for more than cross-entropy.
            TrainingError: if the loss is not finite.

        Source:
            arXiv 2308.09610, stage 2.
        """
        require_plain(recipe)
        read = self._texts(texts)
        if len({tokens.shape[1] for tokens in read.values()}) > 1:
            raise DataError("sequences of all domains must have one length: pack them alike")
        tokens = torch.cat(list(read.values()))
        domains = self.select(tokens)
        head = {n for n, _ in self._shared.named_parameters() if n.startswith("unembed.")}
        shared = _copied(self._shared, head)
        untie(shared)
        names = {n.partition(".")[2] for n in parameters_of(shared) if n.startswith("unembed.")}
        models = {domain: self.model(domain) for domain in dict.fromkeys(domains)}
        losses = train_unembedding(shared, names, models, tokens, domains, recipe, progress)
        self._shared = shared
        return losses

    def evaluate(
        self, texts: Texts, *, selection: str = "oracle", batch: int = 16
    ) -> BankEvaluation:
        """Loss and accuracy on each domain's text, after each domain that was trained.

        Banks do not change, so that each row is made now of the banks that there were then.

        Args:
            texts: Packed text by domain, held out from training.
            selection: `"oracle"`: each sequence gets its domain's bank, and before that was
                trained, the last one before. `"keys"`: the one that `select` gives. `"last"`: the
                last one, whatever the sequence, as if there were no banks and one model were
                fine-tuned on one domain after the other.
            batch: How many sequences run at once.

        Raises:
            DataError: if a domain has no bank, no text or, for `"keys"`, no key.

        Source:
            arXiv 2308.09610.
        """
        if selection not in ("oracle", "keys", "last"):
            raise DataError(f"selection={selection!r}: give 'oracle', 'keys' or 'last'")
        read = self._texts(texts)
        likeness = None
        if selection == "keys":
            likeness = {d: self.similarity(tokens, batch=batch) for d, tokens in read.items()}
        models = {domain: self.model(domain) for domain in (BASE, *self.domains)}
        return evaluate_banks(models, read, likeness, selection, batch)

    def save(
        self, out: str | os.PathLike[str], base: str | os.PathLike[str], *,
        revision: str | None = None,
    ) -> Path:  # fmt: skip
        """Write all banks and keys, and what else differs from a checkpoint.

        Args:
            out: A folder that does not exist yet or is empty.
            base: The checkpoint below, as for `lf.export_adapter`.
            revision: Its branch, tag or commit on the hub.

        Returns:
            The folder, for `lf.load(out, bank=...)` and `NormBanks.load(out)`.

        Raises:
            DataError: if there are no banks.
            LnfreeError: for what `lf.export_adapter` refuses.
        """
        if not self._banks:
            raise DataError("there are no banks to save: train one first")
        keys = {} if self._keys is None else dict(self._keys.of)
        own = {d: (self.model(d), bank, keys.get(d)) for d, bank in self._banks.items()}
        layer = None if self._keys is None else self._keys.layer
        return bank_folder.write(self._shared, own, layer, out, base, revision)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        check: bool = True,
    ) -> "NormBanks":
        """What `save` wrote, to go on with.

        Args:
            folder: The folder, or its id on the hub.
            base: Where the model below is. Default: where it was.
            dtype: Of the weights.
            device: Default: the GPU if there is one, else the CPU.
            check: Compare the logits of each bank with the stored ones.

        Raises:
            CheckpointError: if the folder holds no banks, or is damaged.
            InexactError: if the model below is another one.
        """
        found, shared, own, keys, layer = bank_folder.read(folder, base, dtype, device, check)
        banks = cls(shared, own, None if layer is None else Keys(layer, keys))
        if check:
            for domain in banks.domains:
                found.of_bank(domain).require_sample(banks.model(domain))
        return banks

    def __repr__(self) -> str:
        numbers = sum(W.numel() for n, W in stock_weights(self._shared).items() if n in self._names)
        return f"NormBanks({', '.join(self._banks) or 'none yet'}; {numbers:,} numbers each)"

    def _bank(self, domain: str) -> dict[str, Tensor]:
        if domain == BASE:
            return {}
        self._require_known(domain)
        return self._banks[domain]

    def _require_known(self, domain: str) -> None:
        if domain not in self._banks:
            near = difflib.get_close_matches(domain, [*self._banks, BASE], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"there is no bank {domain!r}: there are {', '.join([*self._banks, BASE])}{hint}"
            )

    def _require_new(self, domain: str) -> None:
        if domain in self._banks:
            raise RecipeError(
                f"{domain} has a bank, and a bank does not change once it is trained: choose "
                f"another name, or start anew from it with start={domain!r}"
            )
        if not domain or domain == BASE or {*"/|"} & {*domain} or domain != domain.strip():
            raise DataError(
                f"{domain!r} cannot name a domain: give a word without / and |, other than {BASE!r}"
            )

    def _texts(self, texts: Texts) -> dict[str, Tensor]:
        """Text of domains that have banks, checked, on the model's device."""
        if not texts:
            raise DataError("there is no text: give packed text by domain, {'docs': tokens}")
        for domain, tokens in texts.items():
            self._require_known(domain)
            _require_text(domain, tokens)
        return {d: read_sequences(self._shared, t, packed=True) for d, t in texts.items()}

    def _of_norms(self, recipe: Recipe) -> Recipe:
        """The recipe with norms alone trained."""
        if recipe.release:
            raise RecipeError("a bank trains norms from its first step to its last: set release=()")
        if recipe.trainable == "all":
            return replace(recipe, trainable="norms")
        chosen = chosen_by(self._shared, recipe.trainable, recipe.seed).chosen
        if others := [name for name in chosen if name not in self._names]:
            raise RecipeError(
                f"a bank has norms alone, and trainable={recipe.trainable!r:.80} chooses "
                f"{others[0]}: leave trainable out, or name norms, such as 'norms:ln2'"
            )
        return recipe


def _require_text(domain: str, tokens: object) -> None:
    if isinstance(tokens, Tensor) and tokens.numel() == 0:
        raise DataError(f"{domain}: there are no tokens: give packed text, lf.pack(...)")


def _copied(model: HookedTransformer, own: set[str]) -> HookedTransformer:
    """A copy that shares all parameters but some, by their names in a stock model."""
    copied = {id(W) for name, W in parameters_of(model).items() if name in own}
    memo: dict[int, object] = {id(W): W for W in model.parameters() if id(W) not in copied}
    return copy.deepcopy(model, memo | {id(model.tokenizer): model.tokenizer})
