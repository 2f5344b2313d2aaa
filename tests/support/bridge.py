"""An exported model in transformer-lens 4.x, which cannot share an environment with 3.9.

`make bridge` runs `write` in this project's environment and `read` in one with transformer-lens 4.
"""

import json
import sys
from pathlib import Path

import torch

TOLERANCE = 1e-5


def write(folder):
    """The bundled model with its norms frozen at measured constants, in every exported layout."""
    import lnfree_interp as lf
    from lnfree_interp.removal.statistics import measure_sigma

    live = lf.load(lf.bundled_checkpoint(), device="cpu")
    sites = lf.with_norm_sites(live)
    tokens = torch.randint(live.cfg.d_vocab, (2, 64), generator=torch.Generator().manual_seed(0))
    for site, sigma in measure_sigma(sites, lf.list_norm_sites(sites), tokens).items():
        lf.freeze_site(sites, site, sigma)
    free = lf.fold(sites)
    lf.export(live, folder / "live")
    lf.export(sites, folder / "sites")
    lf.export(free, folder / "folded")
    lf.export(free, folder / "native", target="transformer_lens")
    with torch.no_grad():
        reference = {"tokens": tokens, "live": live(tokens)}
        reference["free"], cache = free.run_with_cache(tokens)
        reference["resid_post"] = cache["resid_post", -1]
    torch.save(reference, folder / "reference.pt")


def read(folder):
    """Every layout in a TransformerBridge: the same logits, and the same residual stream."""
    from importlib.metadata import version

    from safetensors.torch import load_file
    from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    assert version("transformer_lens").startswith("4."), version("transformer_lens")
    reference = torch.load(folder / "reference.pt", weights_only=True)
    tokens = reference["tokens"]

    def native():
        said = json.loads((folder / "native/hooked_transformer.json").read_text())["config"]
        names = (
            "d_model", "d_head", "n_heads", "n_layers", "n_ctx", "d_mlp", "d_vocab", "act_fn",
            "normalization_type",
        )  # fmt: skip
        cfg = TransformerBridgeConfig(**{name: said[name] for name in names})
        bridge = TransformerBridge.boot_native(cfg)
        weights = load_file(folder / "native/model.safetensors")
        bridge.load_state_dict(convert_tl_checkpoint(weights, cfg), strict=True)
        return bridge.eval()

    worst = 0.0
    for kind in ("live", "sites", "folded", "native"):
        bridge = (
            native()
            if kind == "native"
            else TransformerBridge.boot_transformers(str(folder / kind), device="cpu")
        )
        expected = reference["live" if kind == "live" else "free"]
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(tokens)
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        line = f"{kind:8} logits differ by {error:.1e} relative"
        if kind in ("folded", "native"):
            last = cache[f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"]
            stream = reference["resid_post"]
            stream_error = ((last - stream).abs().max() / stream.abs().max()).item()
            line += f", resid_post by {stream_error:.1e}"
            error = max(error, stream_error)
        sys.stdout.write(line + "\n")
        worst = max(worst, error)
    if worst > TOLERANCE:
        sys.exit(f"transformer-lens 4 differs by {worst:.1e}, above {TOLERANCE:.0e}")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
