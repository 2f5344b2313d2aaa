"""Small random models in which every term counts: no zero bias, no unit gain."""

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lnfree_interp as lf
from lnfree_interp.removal.statistics import measure_sigma

TEXT = ["def add(self, other):\n    return self + other\n", "for i in range(10):\n    print(i)\n"]


def make_tokenizer(vocabulary=300):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TEXT * 20, vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False
    )
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)


def make_gpt2(seed=0, **config):
    """A GPT-2 whose every parameter is random, LayerNorm gains and all biases included."""
    torch.manual_seed(seed)
    settings = {
        "n_layer": 3,
        "n_embd": 32,
        "n_head": 4,
        "n_positions": 48,
        "vocab_size": 300,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = GPT2LMHeadModel(GPT2Config(**(settings | config))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.4 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    return model


def freeze_all(model, seed=0):
    """With norm sites, all frozen, each at a sigma of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = lf.with_norm_sites(model)
    text = torch.randint(model.cfg.d_vocab, (4, 32), generator=generator)
    for name, sigma in measure_sigma(model, lf.list_norm_sites(model), text).items():
        lf.freeze_site(model, name, sigma * (0.8 + torch.rand((), generator=generator).item()))
    return model
