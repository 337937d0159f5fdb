"""lm-evaluation-harness, its own code and examples/lm_eval, gives a saved model our numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from running import ROOT, SAMPLES, command, finish

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm-eval[hf]' (docs/lm-eval.md)")
TASKS = {"sst2": "SST2", "rte": "RTE", "boolq": "BoolQ"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What run.py saves after training."""
    folder = tmp_path_factory.mktemp("model")
    few = {"num_train": 64, "max_steps": 10, "broadcast_rate": 0.05, "no_eval": True}
    files = {"output_dir": folder, "result_file": folder / "result.json", "save_model": True}
    finish(command("SST2", trainer="broadcast", **few, **files))
    return folder


@pytest.fixture(scope="module")
def scored(model: Path) -> tuple[dict[str, Any], Any]:
    """The harness's results and samples of the three tasks, and its model."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    before = os.getcwd()
    os.chdir(ROOT)  # the tasks name their files from there
    try:
        lm = HFLM(pretrained=str(model), device="cpu", batch_size=8)
        manager = TaskManager(include_path=str(ROOT / "examples/lm_eval"), include_defaults=False)
        tasks = [f"hizoo_{name}" for name in TASKS]
        return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager), lm
    finally:
        os.chdir(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_accuracy_and_log_likelihoods_agree(
    tmp_path: Path, model: Path, scored: tuple[dict[str, Any], Any], name: str
) -> None:
    files = {"result_file": tmp_path / "r.json", "predictions_file": tmp_path / "p.jsonl"}
    ours = finish(command(TASKS[name], model_name=model, num_eval=None, **files))
    predictions = [json.loads(line) for line in files["predictions_file"].open()]
    results, lm = scored
    samples = {sample["doc_id"]: sample for sample in results["samples"][f"hizoo_{name}"]}
    rows = (SAMPLES / name / "validation.jsonl").read_text().splitlines()
    assert len(rows) == len(samples) == len(predictions)
    assert results["results"][f"hizoo_{name}"]["acc,none"] == ours["accuracy"]
    # Where a newline ends the prompt the harness counts it to the answer.
    delimiter = yaml.safe_load((ROOT / f"examples/lm_eval/{name}.yaml").open())["target_delimiter"]
    prompts = [samples[each["id"]]["arguments"][0][0] for each in predictions]
    of_newline = [0.0] * len(prompts)
    if delimiter == "\n":
        asked = [SimpleNamespace(args=(prompt, delimiter)) for prompt in prompts]
        of_newline = [value for value, _ in lm.loglikelihood(asked)]
    for each, before in zip(predictions, of_newline, strict=True):
        theirs = [response[0][0] - before for response in samples[each["id"]]["resps"]]
        assert theirs == pytest.approx(each["scores"], abs=1e-4)
