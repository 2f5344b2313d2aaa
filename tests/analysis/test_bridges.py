"""What keeps the analyses importable under TransformerLens 4; `make bridge` runs them there."""

import ast
import subprocess
import sys
from pathlib import Path

import lnfree_interp

PACKAGE = Path(lnfree_interp.__file__).parent
ON_BRIDGES = (
    "affine", "attribute", "averages", "bridge", "counterfactual", "flow", "interventions", "lens",
    "levels", "neurons", "paths", "residual", "scores", "targets", "trace", "weights",
)  # fmt: skip


def imported(path):
    """What a module imports when it is imported, not later inside a function."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def file_of(module):
    path = PACKAGE.parent / module.replace(".", "/")
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def test_no_analysis_imports_what_transformer_lens_4_has_not():
    todo = [f"lnfree_interp.analysis.{name}" for name in ON_BRIDGES]
    todo.append("lnfree_interp.evaluation.certify")
    seen, gone = set(todo), []
    while todo:
        module = todo.pop()
        for name, names in imported(file_of(module)):
            if name.startswith("lnfree_interp") and name not in seen:
                seen.add(name)
                todo.append(name)
            if name.startswith("transformer_lens.components") or "HookedTransformer" in names:
                gone.append(f"{module} imports {name} {names}")
    assert len(seen) > 20
    assert gone == []


ASK = """
import lnfree_interp as lf
from lnfree_interp.errors import UnsupportedModelError
from torch import nn
class TransformerBridge(nn.Module):
    cfg = None
bridge = TransformerBridge()
for call in (lf.fold, lf.frozen_form, lf.with_norm_sites, lf.list_norm_sites, lf.to_rms, lf.to_crms,
             lambda m: lf.export(m, "out"), lambda m: lf.remove_norms(m, None, None)):
    try:
        call(bridge)
    except UnsupportedModelError as error:
        assert "lf.trace" in str(error) and "lf.load" in str(error), error
    else:
        raise AssertionError(call)
"""


def test_a_bridge_given_to_other_calls_is_told_which_call_to_use():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
