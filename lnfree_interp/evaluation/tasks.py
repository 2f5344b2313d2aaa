"""HellaSwag and every other multiple-choice task of EleutherAI's lm-evaluation-harness.

The harness' own wrapper for Hugging Face models does the work; here it gets a `HookedTransformer`
in place of one, so that requests, batches and scores are the harness' own.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models.running import run

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

_MISSING = "tasks need the lm-evaluation-harness: pip install 'lnfree_interp[tasks]'"
BOS_POLICY = "no beginning-of-sequence token, except before an empty context"
"""What the scores assume, as the harness does for GPT-2."""


class _Causal(nn.Module):
    """As much of a causal language model of transformers as the harness looks at."""

    def __init__(self, model: HookedTransformer):
        super().__init__()
        self.hooked = model
        self.config = SimpleNamespace(
            model_type="hooked_transformer", max_position_embeddings=model.cfg.n_ctx
        )

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.hooked.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self.hooked.cfg.dtype

    def tie_weights(self) -> None:
        """TransformerLens keeps W_E and W_U apart."""

    def forward(self, input_ids: Int[Tensor, "batch pos"]) -> SimpleNamespace:
        """Rows are padded on the right, which a causal model does not see."""
        logits: Float[Tensor, "batch pos d_vocab"] = run(self.hooked, input_ids)
        return SimpleNamespace(logits=logits)

    def generate(self, *arguments: Any, **settings: Any) -> Tensor:
        """Not here.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "this task generates text: export the model and run the harness on the folder"
        )


def as_harness_model(
    model: HookedTransformer,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch: int = 8,
) -> "HFLM":
    """A model of the harness, for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: Any.
        tokenizer: Default: the model's. No beginning-of-sequence token is added by either: the one
            that TransformerLens rebuilds would add it to every request and shift the scores.
        batch: Requests per forward pass.

    Raises:
        UnsupportedModelError: if the harness is not installed.
        DataError: if there is no tokenizer.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UnsupportedModelError(_MISSING) from error
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise DataError("a task is text, and the model has no tokenizer")
    wrapper: Any = HFLM  # its signature is hidden from type checkers
    return wrapper(
        pretrained=_Causal(model),
        tokenizer=tokenizer,
        backend="causal",
        add_bos_token=False,
        max_length=model.cfg.n_ctx,
        batch_size=batch,
    )


def require_tasks(
    tasks: str | Sequence[str], include: Path | None = None
) -> tuple[list[str], "TaskManager"]:
    """Refuse, before the work, tasks that cannot be run.

    Raises:
        UnsupportedModelError: if the harness is not installed.
        DataError: if it knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnsupportedModelError(_MISSING) from error
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise DataError(f"the harness knows no task {unknown[0]!r}; its files: include={include}")
    return names, manager


def run_tasks(
    model: HookedTransformer,
    tasks: str | Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, dict[str, float]]:
    """Scores by task and metric, such as `{"hellaswag": {"acc_norm": 0.31, ...}}`.

    Args:
        model: Any.
        tasks: Names that the harness knows, or those of its files in `include`.
        include: A folder with task files of one's own, for instance on local data.
        limit: Only so many examples of each task.
        batch: Requests per forward pass.
        tokenizer: As for `as_harness_model`.

    Raises:
        UnsupportedModelError: if the harness is not installed, or a task generates text.
        DataError: if there is no such task, or its data cannot be had.
    """
    names, manager = require_tasks(tasks, include)
    adapter = as_harness_model(model, tokenizer, batch)
    from lm_eval.evaluator import simple_evaluate

    run: Any = simple_evaluate  # as above
    try:
        found = run(
            model=adapter, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0,
            log_samples=False,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        raise DataError(f"the data of {', '.join(names)} cannot be had: {error}") from error
    assert found is not None
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in scores.items()
            if isinstance(value, int | float) and "stderr" not in metric and "," in metric
        }
        for task, scores in found["results"].items()
    }
