"""The task's metric on the dev set during training: shown, logged, and what the best is best by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import finish, log_of, training

from experiment import training as making

CURVE = {"num_dev": 8, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def test_metric_beside_the_dev_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = finish(training(tmp_path, **CURVE, eval_metric=True, no_eval=None, max_steps=4))
    history = result["history"]
    assert list(history["dev_metric"]) == list(history["dev_loss"]) == ["2", "4"]
    # Nothing is learnt after the last one: it is the result's own.
    assert history["dev_metric"]["4"] == result["dev_metric"]["accuracy"]
    lines = capsys.readouterr().out.splitlines()
    shown = f"dev loss {history['dev_loss']['2']:.4f}, accuracy {history['dev_metric']['2']:.4f}"
    assert f"step 2: {shown}" in lines
    # The run itself is the same with and without it.
    without = finish(training(tmp_path / "b", **CURVE, no_eval=None, max_steps=4))
    assert without["experiment"] == result["experiment"]
    assert without["history"]["dev_loss"] == history["dev_loss"]
    assert "dev_metric" not in without["history"]


def test_metrics_of_generated_answers(tmp_path: Path) -> None:
    generated = {"max_new_tokens": 4, "train_as_classification": None, "eval_metric": True}
    finish(training(tmp_path, "SQuAD", **CURVE, **generated, max_steps=2))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert len(log_of(checkpoint, "eval_f1")) == len(log_of(checkpoint, "eval_em")) == 1


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 4), ("loss", 6)])
def test_the_best_checkpoint_is_best_by_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, best: int
) -> None:
    accuracies = iter((0.25, 0.75, 0.5))

    def measured(*_: Any) -> Any:
        return lambda model: {"accuracy": next(accuracies)}

    monkeypatch.setattr(making, "dev_metric", measured)
    losses = iter((0.5, 0.9, 0.1))
    from training.objective_trainer import ObjectiveTrainer

    loop = ObjectiveTrainer.evaluation_loop

    def falling(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> Any:
        output = loop(self, *args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    monkeypatch.setattr(ObjectiveTrainer, "evaluation_loop", falling)
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    result = finish(training(tmp_path, **CURVE, **chosen))
    assert Path(result["checkpoint"]).name == f"checkpoint-{best}"


def test_tensorboard_shows_what_the_optimizer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finish(training(tmp_path, **CURVE, eval_metric=True, report_to="tensorboard", max_steps=2))
    (file,) = (tmp_path / "events").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = {tag.partition("/")[2] for tag in events.Tags()["scalars"]}
    shown = {"loss", "projected_gradient", "curvature", "hessian_mean", "skipped_steps"}
    shown |= {"forward_passes", "seconds_per_step", "learning_rate"}
    assert shown <= tags
    of_dev = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    assert {"eval/loss", "eval/accuracy"} <= set(of_dev)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    passes = [row["forward_passes"] for row in state["log_history"] if "loss" in row]
    logged = [event.value for event in events.Scalars("train/forward_passes")]
    assert set(passes) <= set(logged) and passes == [4, 7]
