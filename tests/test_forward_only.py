"""ForwardOnlyMixin in transformers' own Trainer, and in TRL's SFTTrainer."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from running import MODEL, ROOT, SAMPLES
from tiny_models import tiny_model
from transformers import Trainer, TrainingArguments

from error_broadcast import ErrorBroadcast
from forward_only import ForwardOnlyMixin
from hizoo import HiZOO, Layers, OnlyInPlace

STEPS, LR = 6, 1e-3
# Of 24 texts of 4 to 8 tokens the last 1 to 5 are scored.
LENGTHS = [4 + number % 5 for number in range(24)]
TEXTS = [torch.arange(5 + n, 5 + n + length).tolist() for n, length in enumerate(LENGTHS)]
ROWS = [{"input_ids": text, "labels": [-100] * 3 + text[3:]} for text in TEXTS]

Batch = dict[str, torch.Tensor]


def collate(rows: list[dict[str, list[int]]]) -> Batch:
    def padded(name: str, pad: int) -> torch.Tensor:
        return torch.tensor([row[name] + [pad] * (8 - len(row[name])) for row in rows])

    batch = {"input_ids": padded("input_ids", 1), "labels": padded("labels", -100)}
    return batch | {"attention_mask": (batch["input_ids"] != 1).long()}


class ForwardOnlyTrainer(ForwardOnlyMixin, Trainer):
    """What a user writes, and the batches that it sees."""

    def training_step(self, model: Any, inputs: Batch, *args: Any) -> torch.Tensor:
        vars(self).setdefault("seen", []).append(dict(inputs))
        return super().training_step(model, inputs, *args)


def make_trainer(
    folder: Path, method: Any = None, dtype: torch.dtype = torch.float32, **arguments: Any
) -> ForwardOnlyTrainer:
    """A trainer of a model with dropout."""
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 4, **arguments}
    args = TrainingArguments(
        str(folder),
        learning_rate=LR,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    model = tiny_model("opt", dropout=0.5).to(dtype)
    return ForwardOnlyTrainer(
        model, args, collate, train_dataset=ROWS, optimizer_cls_and_kwargs=method
    )


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))


def logged(trainer: Trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_a_step_is_that_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    """With the Trainer's schedule, weight decay, seed and accumulated batches of unequal size."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, weight_decay=0.1, seed=7)
    trainer.train()
    model = tiny_model("opt", dropout=0.5).eval()
    decaying = trainer.get_decay_parameter_names(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in decaying], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n not in decaying]},
    ]
    optimizer, losses, slopes, rates = HiZOO(groups, lr=LR, seed=7), [], [], []
    for step in range(STEPS):
        total = count = 0.0
        for batch in trainer.seen[2 * step : 2 * step + 2]:
            items = int((batch["labels"] != -100).sum())
            loss = optimizer.estimate(lambda b=batch: model(**b).loss, items)
            total, count = total + loss * items, count + items
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
        losses.append(total / count)
        slopes.append(optimizer.projected_gradient)
        rates.append(optimizer.param_groups[0]["lr"])
    assert len({int((batch["labels"] != -100).sum()) for batch in trainer.seen}) > 1
    assert largest_difference(weights(trainer), list(model.parameters())) < 1e-6
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-5)
    assert logged(trainer, "learning_rate") == pytest.approx(rates, rel=1e-6)
    assert logged(trainer, "projected_gradient") == pytest.approx(slopes, rel=1e-3)
    for name in ("curvature", "hessian_mean", "hessian_max"):
        assert len(logged(trainer, name)) == STEPS
    assert not logged(trainer, "grad_norm")


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    trained = []
    for size, count in ((2, 4), (8, 1)):
        trainer = make_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=count
        )
        trainer.train()
        trained.append(weights(trainer))
    assert largest_difference(*trained) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path, dtype: torch.dtype) -> None:
    method = HiZOO, {"lr": "auto", "hessian_smooth": 1e-2, "seed": 3}
    whole = make_trainer(tmp_path, method, dtype, save_steps=3)
    before = weights(whole)
    whole.train()
    assert (type(whole.optimizer.layers) is Layers) == (dtype == torch.bfloat16)
    resumed = make_trainer(tmp_path, method, dtype)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(weights(whole), weights(resumed)) == 0
    assert largest_difference(weights(whole), before) > 0
    assert logged(whole, "loss")[3:6] == logged(resumed, "loss")[3:6]
    # η follows the curvature, and falls with the Trainer's schedule.
    assert logged(whole, "learning_rate") != pytest.approx([0.1 * (1 - n / 6) for n in range(6)])


def test_half_precision_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, (HiZOO, {"lr": 0.0, "hessian_smooth": 0.0}), torch.bfloat16)
    before = weights(trainer)
    trainer.train()
    assert largest_difference(weights(trainer), before) == 0
    assert not logged(trainer, "curvature") and not logged(trainer, "hessian_mean")


def test_half_precision_weights_that_a_loss_reads_by_itself_are_refused(tmp_path: Path) -> None:
    class Fused(ForwardOnlyTrainer):
        """Multiplies with the head's matrix itself, as TRL's SFTTrainer."""

        def compute_loss(self, model: Any, inputs: Batch, **_: Any) -> torch.Tensor:
            states = model.model(inputs["input_ids"]).last_hidden_state
            return (states @ model.lm_head.weight.T).float().square().mean()

    trainer = make_trainer(tmp_path, dtype=torch.bfloat16)
    trainer.__class__ = Fused
    before = weights(trainer)
    with pytest.raises(OnlyInPlace, match=r"compute_loss = Trainer\.compute_loss"):
        trainer.train()
    assert largest_difference(weights(trainer), before) == 0


def test_autocast_is_the_trainers(tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, bf16=bf16)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_batch_without_labels_counts_nothing(tmp_path: Path) -> None:
    trained, empty = [], {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    for rows in (ROWS[:4], [empty] * 4 + ROWS[:4]):
        count, order = len(rows) // 4, {"train_sampling_strategy": "sequential"}
        trainer = make_trainer(tmp_path, max_steps=1, gradient_accumulation_steps=count, **order)
        trainer.train_dataset = rows
        trainer.train()
        assert len(trainer.seen) == count and trainer.optimizer.skipped_steps == 0
        trained.append(weights(trainer))
    assert largest_difference(*trained) < 1e-6


def test_error_broadcast_steps_as_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, (ErrorBroadcast, {"lr": 0.5}), gradient_accumulation_steps=2)
    trainer.train()
    model = tiny_model("opt", dropout=0.5).eval()
    optimizer = ErrorBroadcast(model)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / STEPS)
        for batch in trainer.seen[2 * step : 2 * step + 2]:
            items = int((batch["labels"] != -100).sum())
            optimizer.estimate(lambda b=batch: model(**b).loss, items)
        optimizer.step()
    assert largest_difference(weights(trainer), list(model.parameters())) < 1e-5
    rates = logged(trainer, "learning_rate")
    assert rates == pytest.approx([0.5 * (1 - n / STEPS) for n in range(STEPS)])
    assert not logged(trainer, "projected_gradient")


def test_the_next_model_has_a_rate_and_layers_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dtype=torch.bfloat16)
    for rate in (1e-3, 7e-2):  # as in a search of hyperparameters
        trainer.model, trainer.optimizer = tiny_model("opt").to(torch.bfloat16), None
        trainer.args.learning_rate = rate
        assert trainer.create_optimizer().param_groups[0]["lr"] == rate


def test_an_optimizer_that_needs_gradients_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, (torch.optim.SGD, {"lr": 0.1}))
    with pytest.raises(ValueError, match=r"SGD needs gradients: give .*\(HiZOO, \{\.\.\.\}\)"):
        trainer.train()


IN_A_PROCESS = """
import sys
import torch
from pathlib import Path
from test_forward_only import logged, make_trainer, weights
folder, size, own_counts = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "own_counts"
order = {"train_sampling_strategy": "sequential"}
if own_counts:
    order |= {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}
trainer = make_trainer(folder, per_device_train_batch_size=size, **order)
trainer.train()
kept = {"weights": weights(trainer), "losses": logged(trainer, "loss")}
torch.save(kept, folder / f"{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(IN_A_PROCESS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    kept = []
    for name, launcher, size in (
        ("alone", [], 8),
        ("two", torchrun, 4),
        ("own_counts", torchrun, 4),
    ):
        (tmp_path / name).mkdir()
        argv = [sys.executable, *launcher, str(script), str(tmp_path / name), str(size), name]
        paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        subprocess.run(argv, check=True, env=os.environ | paths, capture_output=True)
        kept += [torch.load(file) for file in sorted((tmp_path / name).glob("*.pt"))]
    alone, first, second, *of_own_counts = kept
    assert largest_difference(*(each["weights"] for each in of_own_counts)) == 0
    assert largest_difference(first["weights"], second["weights"]) == 0
    assert largest_difference(first["weights"], alone["weights"]) < 1e-5
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--broadcast"]])
def test_trl_steps_without_a_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str]
) -> None:
    assert len((ROOT / "examples/trl_sft.py").read_text(encoding="utf-8").splitlines()) <= 40
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tiny-opt").symlink_to(MODEL)
    (tmp_path / "data/samples").symlink_to(SAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["trl_sft", *arguments])
    runpy.run_module("examples.trl_sft", run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", printed)]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    # TRL's own metrics are those of training.
    assert ("mean_token_accuracy" in printed) == (not arguments)
