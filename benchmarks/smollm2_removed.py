"""How far SmolLM2-135M without its norms is from the original, beside the control.

    make smollm2
    python benchmarks/english_text.py text.jsonl
    head -n 5000 text.jsonl > train.jsonl; tail -n +5001 text.jsonl > heldout.jsonl
    OPTIONS="--steps 1350 --batch 1 --micro-batch 1 --sequence-length 256 --heldout 16"
    lnfree remove MODEL.gguf --data train.jsonl $OPTIONS --rollback --out run
    lnfree remove MODEL.gguf --data train.jsonl $OPTIONS --vanilla --prepend-bos --out control
    python benchmarks/smollm2_removed.py heldout.jsonl --lnfree run/model [--control control/model]
    python benchmarks/smollm2_removed.py heldout.jsonl --partial

MODEL.gguf is what `lf.smollm2()` returns. Texts are held-out documents, packed after the
beginning-of-text token. Recall is the share of 100 prompts whose likeliest next token is the
answer: capitals in two phrasings, and random tokens that repeat, drawn as they are in the text,
from the text's with each as likely, and from the whole vocabulary, most of which is rare. Sequences
on which a token of the model of the removal overflows are counted, and left out of the comparison.
`--partial` measures what some groups of norms cost without any training, first tokens apart.
"""

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from torch import Tensor
from transformer_lens import HookedTransformer
from tyro.conf import Positional

import lnfree_interp as lf

LENGTH = 256
PHRASES = ("The capital of {} is the city of", "{} is a country, and its capital city is called")
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest",
    "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Ireland": "Dublin", "Russia": "Moscow", "Ukraine": "Kiev",
    "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Nigeria": "Abuja",
    "Ethiopia": "Addis", "Ghana": "Accra", "Morocco": "Rabat", "Tunisia": "Tunis",
    "Algeria": "Algiers", "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus",
    "Lebanon": "Beirut", "Jordan": "Amman", "India": "New", "Pakistan": "Islamabad",
    "Bangladesh": "Dhaka", "Nepal": "Kathmandu", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Indonesia": "Jakarta", "Japan": "Tokyo", "China": "Beijing", "South Korea": "Seoul",
    "Mongolia": "Ul", "Australia": "Canberra", "New Zealand": "Wellington", "Canada": "Ottawa",
    "Mexico": "Mexico", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
    "Argentina": "Buenos", "Colombia": "Bogota",
}  # fmt: skip
GROUPS = {
    "ln_final": ("ln_final",),
    "every ln1.v": ("ln1.v",),
    "every ln1 (qk and v)": ("ln1.qk", "ln1.v"),
    "every ln1 and ln_final": ("ln1.qk", "ln1.v", "ln_final"),
    "every ln2": ("ln2",),
}


def capitals(model: HookedTransformer) -> list[tuple[Tensor, int]]:
    """Prompts [pos] about capitals, and the first token of the answer."""
    return [
        (
            model.to_tokens(phrase.format(country))[0],
            model.to_tokens(f" {city}", False)[0, 0].item(),
        )
        for phrase in PHRASES
        for country, city in CAPITALS.items()
    ]


def repetitions(
    model: HookedTransformer, pool: Tensor, n: int = 100, length: int = 20
) -> list[tuple[Tensor, int]]:
    """Random tokens of a pool, then the first half of them again: the next one is the answer."""
    generator = torch.Generator().manual_seed(0)
    bos, found = model.tokenizer.bos_token_id, []
    for _ in range(n):
        tokens = pool[torch.randint(len(pool), (length,), generator=generator)]
        half = length // 2
        prompt = torch.cat([torch.tensor([bos]), tokens, tokens[:half]])
        found.append((prompt, int(tokens[half])))
    return found


@torch.no_grad()
def recall(model: HookedTransformer, prompts: Sequence[tuple[Tensor, int]]) -> float:
    """The share of prompts whose likeliest next token is the answer."""
    right = [int(model(tokens[None])[0, -1].argmax()) == answer for tokens, answer in prompts]
    return sum(right) / len(right)


@torch.no_grad()
def overflows_nowhere(model: HookedTransformer, tokens: Tensor) -> Tensor:
    """Whether all logits of a sequence are finite, by sequence."""
    return torch.stack([model(row[None]).isfinite().all() for row in tokens])


@torch.no_grad()
def indirect_objects(model: HookedTransformer, n: int = 64) -> tuple[float, float]:
    """Mean logit difference of the indirect object over the subject; the share above 0."""
    clean, _, right, wrong = lf.ioi_pairs(model, n, prepend_bos=True)
    logits = model(clean)[:, -1]
    apart = (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]
    return apart.mean().item(), (apart > 0).float().mean().item()


def exactness(model: HookedTransformer) -> None:
    """What is exact on a model, on one prompt about an indirect object."""
    trace = lf.trace(model, "When Mary and John went to the store, John gave a drink to")
    target = lf.LogitDifference(" Mary", " John")
    asks = {
        "direct logit attribution by head": lambda: lf.attribute(trace, target, by="head"),
        "paths": lambda: lf.expand_paths(trace, target),
        "scores of L23H3": lambda: lf.attribute_scores(trace, 23, 3),
        "pattern of L23H3 without L20H5": lambda: lf.counterfactual_pattern(
            trace, 23, 3, without="L20H5"
        ),
    }
    print("\n| exact, nothing held | error |\n|---|---|")
    for name, ask in asks.items():
        try:
            found = str(ask().verify().error)
        except lf.errors.LnfreeError as error:
            found = str(error).partition(":")[0]
        print(f"| {name} | {found} |")


def price_groups(model: HookedTransformer, text: Tensor, heldout: Tensor) -> None:
    """What groups of norms cost without training."""
    print("\n| frozen without training | sites | nats added | KL | top-1 agreement |")
    print("|---|---|---|---|---|")
    every = lf.list_norm_sites(model)
    groups = {
        name: [site for site in every if site.kind in kinds] for name, kinds in GROUPS.items()
    }
    late = [site for site in every if site.layer is None or site.layer > 11]
    groups["every site after layer 11"] = late
    groups["all"] = list(every)
    for name, sites in groups.items():
        price = lf.freeze_for(model, sites, text, heldout=heldout, progress=False).price
        print(
            f"| {name} | {len(sites)} of {len(every)} | {price.added:+.4f} | "
            f"{price.divergence:.4f} | {price.agreement:.1%} |",
            flush=True,
        )


def main(
    heldout: Positional[Path],
    lnfree: Path | None = None,
    control: Path | None = None,
    partial: bool = False,
    sequences: int = 80,
) -> None:
    """Measure and print.

    Args:
        heldout: Documents that no run saw.
        lnfree: The model of the removal.
        control: The model of the same run with `--vanilla`.
        partial: Measure what groups of norms cost without training.
        sequences: Held-out sequences of 256 tokens.
    """
    began = time.perf_counter()
    original = lf.load(lf.smollm2())
    texts = [json.loads(line)["text"] for line in heldout.read_text(encoding="utf-8").splitlines()]
    tokens = lf.pack(texts, original.tokenizer, LENGTH, prepend_bos=True)
    tokens = tokens[torch.arange(sequences + 8) * len(tokens) // (sequences + 8)]
    if partial:
        price_groups(original, tokens[:8], tokens[8:])
    if lnfree is not None:
        models = {"original": original}
        models |= {"vanilla": lf.load(control)} if control is not None else {}
        made = lf.load(lnfree)
        live, every = len(lf.live_sites(made)), len(lf.list_norm_sites(made))
        models["LN-free" if not live else f"{every - live} of {every} norms removed"] = made
        finite = overflows_nowhere(made, tokens[8:])
        print(
            f"a token overflows on {int((~finite).sum())} of {sequences} sequences; on the others:"
        )
        found = lf.evaluate(models, tokens[8:][finite], original="original", neurons=0, pairs=0)
        print(found.table().to_text())
        seen, every_token = tokens[8:, 1:].flatten(), torch.arange(1000, original.cfg.d_vocab)
        asked = [
            capitals(original),
            *(repetitions(original, pool) for pool in (seen, seen.unique(), every_token)),
        ]
        print(
            "| | capitals | repeated: tokens of the text | each as likely | of the vocabulary "
            "| IOI logit difference | IOI accuracy |"
        )
        print("|---|---|---|---|---|---|---|")
        for name, model in models.items():
            shares = " | ".join(f"{recall(model, prompts):.2f}" for prompts in asked)
            difference, accuracy = indirect_objects(model)
            print(f"| {name} | {shares} | {difference:+.2f} | {accuracy:.2f} |")
        exactness(made)
    print(
        f"\n{tokens[8:].numel():,} held-out tokens; {time.perf_counter() - began:.0f} s; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads of "
        f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}"
    )


if __name__ == "__main__":
    tyro.cli(main)
