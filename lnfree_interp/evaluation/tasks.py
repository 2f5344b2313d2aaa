"""HellaSwag and every other multiple-choice task of EleutherAI's lm-evaluation-harness.

The harness' own wrapper for Hugging Face models does the work; here it gets a `HookedTransformer`
instead, so that requests, batches and scores are the harness' own.
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

from lnfree_interp.checkpoints.hub import first_line
from lnfree_interp.errors import DataError, LnfreeError, UnsupportedModelError
from lnfree_interp.models.construct import original_tokenizer
from lnfree_interp.models.running import run

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

_MISSING = (
    "tasks need the lm-evaluation-harness: pip install lm-eval, which the extra "
    "lnfree_interp[tasks] has too"
)


_GENERATES = "this task generates text: export the model and run the harness on the folder"


class _Causal(nn.Module):
    """A `HookedTransformer` with the members of a causal language model that the harness uses."""

    def __init__(self, model: HookedTransformer):
        super().__init__()
        self.hooked = model
        self.config = SimpleNamespace(
            model_type="hooked_transformer", max_position_embeddings=model.cfg.n_ctx
        )

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.hooked.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.hooked.cfg.dtype

    def tie_weights(self) -> None:
        """Do nothing, since TransformerLens keeps W_E and W_U apart."""

    def forward(self, input_ids: Int[Tensor, "batch pos"]) -> SimpleNamespace:
        """Compute logits. Rows are padded on the right, which a causal model does not see."""
        logits: Float[Tensor, "batch pos d_vocab"] = run(self.hooked, input_ids)
        return SimpleNamespace(logits=logits)

    def generate(self, *arguments: Any, **settings: Any) -> Tensor:
        """Raise an error, since text is not generated here.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(_GENERATES)


def as_harness_model(
    model: HookedTransformer,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch: int = 8,
) -> "HFLM":
    """The model as a model of the harness, for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: A `HookedTransformer` in any form.
        tokenizer: The tokenizer of the requests. Default: the model's, as it was before
            TransformerLens rebuilt it, which would add a beginning-of-sequence token to every
            request and shift the scores; for a model that `load` did not make, none is added. See
            `bos_policy`.
        batch: How many requests run at once.

    Returns:
        An `HFLM` of the harness around the model, for tasks that score text, not for generation.

    Raises:
        UnsupportedModelError: if the harness is not installed.
        DataError: if there is no tokenizer.

    Source:
        https://github.com/EleutherAI/lm-evaluation-harness

    Examples:
        >>> from lm_eval import simple_evaluate  # doctest: +SKIP
        >>> simple_evaluate(lf.as_harness_model(model), tasks=["hellaswag"])  # doctest: +SKIP
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UnsupportedModelError(_MISSING) from error
    adds_bos = None  # leaves it to the tokenizer
    if tokenizer is None:
        if model.tokenizer is None:
            raise DataError("a task is text, and the model has no tokenizer: give one")
        tokenizer = original_tokenizer(model.tokenizer)
        adds_bos = False if tokenizer is model.tokenizer else None
    wrapper: Any = HFLM  # its signature is hidden from type checkers
    return wrapper(
        pretrained=_Causal(model),
        tokenizer=tokenizer,
        backend="causal",
        add_bos_token=adds_bos,
        max_length=model.cfg.n_ctx,
        batch_size=batch,
    )


def bos_policy(model: HookedTransformer) -> str:
    """Which requests of a task begin with a beginning-of-sequence token, in words."""
    adapter: Any = as_harness_model(model)
    if adapter.tok_encode("a") == adapter.tok_encode("a", add_special_tokens=False):
        return "no beginning-of-sequence token, except before an empty context"
    return "a beginning-of-sequence token before every request, as the tokenizer adds it"


def open_tasks(
    tasks: str | Sequence[str], include: Path | None = None, limit: int | None = None
) -> tuple[list[str], "TaskManager"]:
    """Open tasks and their data, and check before any work is done that they can be run.

    Raises:
        UnsupportedModelError: if the harness is not installed, or a task generates text.
        DataError: if there is no such task, or its data cannot be opened.
    """
    if include is not None and not Path(include).is_dir():
        raise DataError(f"{include} is no folder with task files: give an existing folder")
    if limit is not None and limit < 1:
        raise DataError(f"{limit} examples are too few for a task: give a limit of at least 1")
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = _manager(names, include)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        own = "" if include is None else f", and neither do the files in {include}"
        raise DataError(f"the harness knows no task {unknown[0]!r}{own}")
    try:
        found = manager.load(names)["tasks"]
    except (LnfreeError, MemoryError):
        raise
    except Exception as error:  # anything that a task's own code or the hub raises
        raise DataError(f"{', '.join(names)} cannot be opened: {first_line(error)}") from error
    if texts := [name for name, task in found.items() if task.OUTPUT_TYPE == "generate_until"]:
        raise UnsupportedModelError(f"{texts[0]}: {_GENERATES}")
    return names, manager


def _manager(names: list[str], include: Path | None) -> "TaskManager":
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnsupportedModelError(_MISSING) from error
    if include is None:
        return TaskManager()
    # Reading the harness' own fourteen thousand task files takes longer than a small task.
    alone = TaskManager(include_path=str(include), include_defaults=False)
    if set(names) <= set(alone.all_subtasks):
        return alone
    return TaskManager(include_path=str(include))


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
        model: A `HookedTransformer` in any form.
        tasks: Names of tasks that the harness knows, or of tasks in `include`.
        include: A folder with your own task files, for instance for local data.
        limit: How many examples of each task to use, from its first on. Default: all.
        batch: How many requests run at once.
        tokenizer: The tokenizer of the requests, as for `as_harness_model`.

    Returns:
        Scores under the harness' names, without standard errors; accuracies are shares from 0 to 1.

    Raises:
        UnsupportedModelError: if the harness is not installed, or a task generates text.
        DataError: if there is no such task, its data cannot be opened, or there is no tokenizer.

    Source:
        https://github.com/EleutherAI/lm-evaluation-harness

    Examples:
        >>> lf.run_tasks(model, "hellaswag", limit=100)  # doctest: +SKIP
        {'hellaswag': {'acc': ..., 'acc_norm': ...}}
    """
    names, manager = open_tasks(tasks, include, limit)
    return score_tasks(model, names, manager, limit=limit, batch=batch, tokenizer=tokenizer)


def score_tasks(
    model: HookedTransformer,
    names: list[str],
    manager: "TaskManager",
    *,
    limit: int | None = None,
    batch: int = 8,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, dict[str, float]]:
    """The scores of `run_tasks`, for tasks that `open_tasks` opened."""
    adapter = as_harness_model(model, tokenizer, batch)
    from lm_eval.evaluator import simple_evaluate

    run: Any = simple_evaluate  # its signature is hidden from type checkers
    try:
        found = run(
            model=adapter, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0,
            log_samples=False,
        )  # fmt: skip
    except (LnfreeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anything that a task's own code or templates raise
        raise DataError(f"{', '.join(names)} cannot be run: {first_line(error)}") from error
    assert found is not None
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in scores.items()
            if isinstance(value, int | float) and "stderr" not in metric and "," in metric
        }
        for task, scores in found["results"].items()
    }
