"""The task's metric on the dev set during training: shown, logged, and what the best is best by."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from running import finish, log_of, training

from experiment import training as making
from experiment.running import reported
from training.objective_trainer import ObjectiveTrainer

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
    let_measure(monkeypatch, accuracies=(0.25, 0.75, 0.5), losses=(0.5, 0.9, 0.1))
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    result = finish(training(tmp_path, **CURVE, **chosen))
    assert Path(result["checkpoint"]).name == f"checkpoint-{best}"


def test_another_metric_is_not_compared_with_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_measure(monkeypatch, accuracies=(0.9, 0.9, 0.3, 0.2), losses=(0.5, 0.4, 0.9, 0.9))
    finish(training(tmp_path, **CURVE, max_steps=4, load_best_model_at_end=True))
    (tmp_path / "result.json").unlink()
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    result = finish(training(tmp_path, **CURVE, **chosen, max_steps=8))
    assert result["resumed_from"].endswith("checkpoint-4")
    assert Path(result["checkpoint"]).name == "checkpoint-6"
    assert "the best accuracy until step 4 is not known: " in caplog.text


def let_measure(
    monkeypatch: pytest.MonkeyPatch, accuracies: Iterable[float], losses: Iterable[float]
) -> None:
    """Let the dev set's accuracies and losses be these."""
    accuracies, losses = iter(accuracies), iter(losses)
    monkeypatch.setattr(
        making, "dev_metric", lambda *_: lambda model: {"accuracy": next(accuracies)}
    )
    loop = ObjectiveTrainer.evaluation_loop

    def measure(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> Any:
        output = loop(self, *args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    monkeypatch.setattr(ObjectiveTrainer, "evaluation_loop", measure)


def test_tensorboard_shows_what_the_optimizer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few = {"max_steps": 2, "no_eval": None, "eval_before_training": True}
    result = finish(training(tmp_path, **CURVE, eval_metric=True, report_to="tensorboard", **few))
    events = EventAccumulator(str(tmp_path / "events"))
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
    # The settings of the run, and the metrics that are printed at its end.
    assert "settings/text_summary" in events.Tags()["tensors"]
    assert set(reported_metrics(result)) == {
        *("test/accuracy", "test/accuracy_before_training", "eval/final_accuracy"),
        *("test/accuracy_standard_error", "test/accuracy_before_training_standard_error"),
        "eval/final_accuracy_standard_error",
    }
    for name, value in reported_metrics(result).items():
        assert events.Scalars(name)[-1].value == pytest.approx(value)


def reported_metrics(result: dict[str, Any]) -> dict[str, float]:
    return {name.replace("_", "/", 1): value for name, value in reported(result).items()}


@pytest.mark.slow
def test_wandb_has_the_settings_and_the_final_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install wandb, which no requirement names")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    own = {"zo_eps": 2e-3, "learning_rate": "auto", "logging_steps": 1, "max_steps": 2}
    result = finish(training(tmp_path, report_to="wandb", num_dev=6, no_eval=None, **own))
    summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    wandb.finish()
    assert {name: summary[name] for name in reported_metrics(result)} == reported_metrics(result)
    assert summary["train/global_step"] == 2 and summary["train/forward_passes"] == 7
    assert 0 < summary["train/learning_rate"] != 0.1  # η, not the part k that "auto" takes
    assert (config["zo_eps"], config["task_name"], config["learning_rate"]) == (
        2e-3,
        "SST2",
        "auto",
    )
