"""Tasks of the lm-evaluation-harness: scores are those of its own wrapper."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.models import make_gpt2
from tokenizers.processors import TemplateProcessing

import lnfree_interp as lf
from lnfree_interp.errors import DataError, UnsupportedModelError


@pytest.fixture
def dtype():
    return torch.float32


HELLASWAG = [
    {
        "ctx_a": "def add(self, other):", "ctx_b": "return", "activity_label": "for i in",
        "endings": ["self + other", "range(10)", "print(i) [title] self", "other other"],
        "label": str((3 * (i % 4) + i // 4) % 4),
    }
    for i in range(16)
]  # fmt: skip


@pytest.fixture
def task_folder(tmp_path):
    """A task on a local file in HellaSwag's format, processed by the harness' own code."""
    pytest.importorskip("lm_eval")
    rows = tmp_path / "rows.jsonl"
    endings = HELLASWAG[0]["endings"]
    rows.write_text(
        "\n".join(
            json.dumps(row | {"endings": endings[i % 4 :] + endings[: i % 4]})
            for i, row in enumerate(HELLASWAG)
        )
    )
    (tmp_path / "local.yaml").write_text(
        "task: local_hellaswag\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {rows}\n"
        "validation_split: validation\nprocess_docs: !function utils.process_docs\n"
        'doc_to_text: "{{query}}"\ndoc_to_target: "{{label}}"\ndoc_to_choice: "choices"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    import lm_eval.tasks.hellaswag.utils as utils

    (tmp_path / "utils.py").write_text(Path(utils.__file__).read_text())
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_tasks_score_as_the_harness_does(task_folder, gpt2_folder, tokenizer, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    model = lf.load(gpt2_folder, dtype=torch.float32)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(gpt2_folder), tokenizer=tokenizer,
        batch_size=3,
    )  # fmt: skip
    options = {"tasks": ["local_hellaswag"], "task_manager": manager, "bootstrap_iters": 0}
    expected = lm_eval.simple_evaluate(model=theirs, **options)
    ours = lm_eval.simple_evaluate(model=lf.as_harness_model(model, batch=5), **options)
    for one, other in zip(
        *(run["samples"]["local_hellaswag"] for run in (ours, expected)), strict=True
    ):
        found, wanted = ([pair[0] for pair in run["filtered_resps"]] for run in (one, other))
        assert found == pytest.approx(wanted, rel=1e-5)
    scores = lf.run_tasks(model, "local_hellaswag", include=task_folder)["local_hellaswag"]
    results = expected["results"]["local_hellaswag"]
    assert scores == {"acc": results["acc,none"], "acc_norm": results["acc_norm,none"]}
    assert 0 < scores["acc"] < 1
    assert model.tokenizer.padding_side == "right"
    evaluation = lf.evaluate(
        model, torch.arange(20)[None], tasks="local_hellaswag", include=task_folder, limit=4
    )
    assert "local_hellaswag, acc_norm" in evaluation.to_frame().index
    with pytest.raises(DataError, match="knows no task 'nonsense', and neither do the files"):
        lf.run_tasks(model, "nonsense", include=task_folder)
    assert "no beginning-of-sequence token" in evaluation.bos_policy
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UnsupportedModelError, match=r"lnfree_interp\[tasks\]"):
        lf.as_harness_model(model)


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_that_adds_bos_adds_it_here_too(task_folder, tokenizer, tmp_path):
    """As Llama's and Gemma's do."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "with_bos"
    make_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    starts = AutoTokenizer.from_pretrained(folder)
    bos = starts.bos_token
    starts.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, starts.bos_token_id)]
    )
    starts.save_pretrained(folder)
    starts = AutoTokenizer.from_pretrained(folder)
    assert starts("def").input_ids[0] == starts.bos_token_id
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=starts, batch_size=3
    )
    options = {
        "task_manager": TaskManager(include_path=str(task_folder), include_defaults=False),
        "bootstrap_iters": 0,
    }
    ours = lf.as_harness_model(lf.load(folder, dtype=torch.float32))
    answers = [
        [
            pair[0]
            for row in simple_evaluate(model=model, tasks=["local_hellaswag"], **options)[
                "samples"
            ]["local_hellaswag"]
            for pair in row["filtered_resps"]
        ]
        for model in (ours, theirs)
    ]
    assert answers[0] == pytest.approx(answers[1], rel=1e-5)
    found = lf.evaluate(
        lf.load(folder), torch.arange(20)[None], tasks="local_hellaswag", include=task_folder,
        limit=2, pairs=0, neurons=0, effects=False,
    )  # fmt: skip
    assert found.bos_policy.startswith("model: a beginning-of-sequence token before every request")


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.filterwarnings("ignore")
def test_tasks_that_cannot_be_run_are_refused_first(task_folder, live, tmp_path):
    yaml = (task_folder / "local.yaml").read_text()
    variants = {
        "writes": ("multiple_choice", "generate_until"),
        "elsewhere": ("rows.jsonl", "nowhere.jsonl"),
        "template": ("{{query}}", "{{ 1 / 0 }}"),
    }
    for name, change in variants.items():
        text = yaml.replace("local_hellaswag", name).replace(*change)
        (task_folder / f"{name}.yaml").write_text(text)

    def evaluate(task, **settings):
        return lf.evaluate(
            live, torch.arange(20)[None], tasks=task, include=task_folder, pairs=0, neurons=0,
            effects=False, **settings,
        )  # fmt: skip

    with pytest.raises(UnsupportedModelError, match="writes: this task generates text"):
        evaluate("writes")
    with pytest.raises(UnsupportedModelError, match="generates text"):
        lf.as_harness_model(live).model.generate()
    with pytest.raises(DataError, match="elsewhere cannot be opened"):
        evaluate("elsewhere")
    with pytest.raises(DataError, match=r"template cannot be (opened|run)"):
        evaluate("template")
    with pytest.raises(DataError, match="0 examples"):
        evaluate("local_hellaswag", limit=0)
    with pytest.raises(DataError, match="no folder with task files"):
        lf.run_tasks(live, "hellaswag", include=tmp_path / "nowhere")
