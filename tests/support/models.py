"""Small random models in which every term counts: no zero bias, no unit gain."""

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

import lnfree_interp as lf
from lnfree_interp.removal.statistics import measure_sigma
from support.architectures import make_model

TEXT = ["def add(self, other):\n    return self + other\n", "for i in range(10):\n    print(i)\n"]


def make_tokenizer(vocabulary=300):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TEXT * 20, vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False
    )
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)


def make_gpt2(seed=0, **settings):
    """A GPT-2 whose every parameter is random, LayerNorm gains and all biases included."""
    return make_model("gpt2", seed, **settings)


def freeze_all(model, seed=0):
    """With norm sites, all frozen, each at a sigma of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = lf.with_norm_sites(model)
    text = torch.randint(model.cfg.d_vocab, (4, 32), generator=generator)
    for name, sigma in measure_sigma(model, lf.list_norm_sites(model), text).items():
        lf.freeze_site(model, name, sigma * (0.8 + torch.rand((), generator=generator).item()))
    return model
