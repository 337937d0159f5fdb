"""Callbacks of the Trainer: costs, shown progress, signals, the end of a run that diverges."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from language_model.objectives import NegativeTextMetric

# Entries of the log that are shown, with short names.
SHOWN = {
    "projected_gradient": ("g", ".3g"),
    "curvature": ("c", ".3g"),
    "hessian_mean": ("h", ".4g"),
    "eta": ("η", ".2g"),
    "skipped_steps": ("skipped", "d"),
}
METRICS = ("accuracy", "reward", "f1", "em")


class ShownObjective(NamedTuple):
    """The objective's name, and its sign: -1 where it is maximised."""

    name: str = "loss"
    sign: int = 1

    def text(self, value: float) -> str:
        """Return a value of the loss as it is shown."""
        return f"{self.sign * float(value):.4f}"


class TellStep(TrainerCallback):
    """Tells an objective that draws at random the number of the step; None between steps."""

    def __init__(self, objective: NegativeTextMetric) -> None:
        self.objective = objective

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the number of the step that begins."""
        self.objective.step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell that the step has ended."""
        self.objective.step = None


class StopDiverged(TrainerCallback):
    """Saves a checkpoint and stops a run that has diverged.

    Args:
        find_reason: called after every step; says why the run has diverged, or None.

    Attributes:
        reason: why the run was stopped, None if it was not.
    """

    def __init__(self, find_reason: Callable[[], str | None]) -> None:
        self.find_reason = find_reason
        self.reason: str | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for a reason."""
        self.reason = self.find_reason()
        if self.reason:
            save_and_stop(control)


class SaveOnInterrupt(TrainerCallback):
    """Saves a checkpoint and stops after the current step when a signal arrives.

    SIGINT is Ctrl-C. Slurm sends SIGTERM, or SIGUSR1 (``sbatch --signal``), before a job's time is
    over.

    Attributes:
        received: the signal's name, None as long as none arrived.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen for the signals."""
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop once a signal has arrived; processes that train together stop after one step."""
        if args.world_size > 1:
            number = signal.Signals[self.received] if self.received else 0
            shared = torch.tensor(int(number), device=args.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            self.received = signal.Signals(int(shared)).name if shared else None
        if self.received:
            save_and_stop(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the signals' handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def save_and_stop(control: TrainerControl) -> None:
    """Ask the Trainer for a checkpoint, for the losses since the last log entry, and for an end."""
    control.should_log = control.should_save = control.should_training_stop = True


class Costs(TrainerCallback):
    """Counts what training has taken, before an interruption too.

    Attributes:
        forward_passes: of training in this process, those of probes included; not those of dev
            losses and metrics.
        backward_passes: likewise.
    """

    def __init__(self) -> None:
        self.forward_passes = self.backward_passes = 0
        self._before = 0.0
        self._started = self._step_began = time.perf_counter()
        # Of the steps since the last entry of the log.
        self._in_steps, self._steps = 0.0, 0

    @property
    def seconds(self) -> float:
        """The seconds until now, to a thousandth, dev losses and checkpoints included."""
        return round(self._before + time.perf_counter() - self._started, 3)

    def passes(self) -> dict[str, int]:
        """Return the passes until now, backward ones if there are any."""
        backward = {"backward_passes": self.backward_passes} if self.backward_passes else {}
        return {"forward_passes": self.forward_passes, **backward}

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Continue from ``seconds`` and ``passes()`` of a checkpoint."""
        self._before = saved["seconds"]
        self.forward_passes = saved["forward_passes"]
        self.backward_passes = saved.get("backward_passes", 0)

    def logged(self) -> dict[str, float]:
        """Return what an entry of the log gets, with the seconds of a step since the last one."""
        costs: dict[str, float] = {**self.passes(), "seconds": self.seconds}
        if self._steps:
            costs["seconds_per_step"] = round(self._in_steps / self._steps, 6)
        self._in_steps, self._steps = 0.0, 0
        return costs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when a step begins."""
        self._step_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a step's time."""
        self._in_steps += time.perf_counter() - self._step_began
        self._steps += 1


class RunState(TrainerCallback, ExportableState):
    """Keeps in checkpoints what transformers' own state lacks.

    Args:
        save: returns it, as JSON has it.
        resume: takes it back, before the first step of a resumed run.
    """

    def __init__(
        self, save: Callable[[], dict[str, Any]], resume: Callable[[dict[str, Any]], None]
    ) -> None:
        self.save, self.resume = save, resume

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves."""
        return {"args": {}, "attributes": {"saved": self.save()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what the checkpoint has."""
        if state.global_step:
            self.resume(self.read(state))

    @staticmethod
    def read(state: TrainerState) -> dict[str, Any]:
        """Return what a checkpoint's state has kept; nothing if another program wrote it."""
        kept = state.stateful_callbacks.setdefault("RunState", {})
        return kept.get("attributes", {}).get("saved", {})


class LogLines(TrainerCallback):
    """A line for every entry of the log, in place of the Trainer's dictionaries."""

    def __init__(self, objective: ShownObjective) -> None:
        super().__init__()
        self.objective = objective
        self._began, self._first = time.perf_counter(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where the run begins."""
        super().on_train_begin(args, state, control, **kwargs)
        self._began, self._first = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the training loss or the dev loss, whichever the entry has."""
        if not state.is_world_process_zero or not logs:
            return
        name, text = self.objective.name, self.objective.text
        if "loss" in logs:
            shown = {name: text(logs["loss"])}
            for long, (short, form) in SHOWN.items():
                if long in logs and (long != "skipped_steps" or logs[long]):
                    shown[short] = format(logs[long], form)
            self.show(state, shown)
        if "eval_loss" in logs:
            measured = [f"dev {name} {text(logs['eval_loss'])}"]
            measured += [f"{m} {logs[f'eval_{m}']:.4f}" for m in METRICS if f"eval_{m}" in logs]
            self.write(f"step {state.global_step}: {', '.join(measured)}")

    def show(self, state: TrainerState, values: Mapping[str, str]) -> None:
        """Show the values of a step."""
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        left = (state.max_steps - state.global_step) / max(1, state.global_step - self._first)
        left = tqdm.format_interval(left * (time.perf_counter() - self._began))
        self.write(f"step {state.global_step} of {state.max_steps}: {shown}, {left} left")

    def write(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)


class LossProgress(LogLines, ProgressCallback):
    """The Trainer's progress bar with the training loss in it; dev losses are lines above it."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar, if training had begun."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def show(self, state: TrainerState, values: Mapping[str, str]) -> None:
        """Show the values of a step in the bar."""
        if self.training_bar is not None:
            self.training_bar.set_postfix(values)

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line)
