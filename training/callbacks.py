"""What looks on while the Trainer trains: progress, lines of the log, signals, the end of a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
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

# The log's entries that a person wants to see, and how they are called in little room.
SHOWN = {
    "projected_gradient": ("g", ".3g"),
    "curvature": ("c", ".3g"),
    "hessian_mean": ("h", ".4g"),
    "eta": ("η", ".2g"),
    "skipped_steps": ("skipped", "d"),
    "clipped_steps": ("clipped", "d"),
}
# What a task's metrics are called.
METRICS = ("accuracy", "reward", "f1", "em")
# A step of these kinds is news, that there was none is not.
NEWS = ("skipped_steps", "clipped_steps")


class ShownObjective(NamedTuple):
    """How the objective is called where people read it, and its sign: -1 where it is maximised."""

    name: str = "loss"
    sign: int = 1

    def text(self, value: float) -> str:
        """Return a value of the loss as it is shown."""
        return f"{self.sign * float(value):.4f}"


class TellStep(TrainerCallback):
    """Tells an objective that draws at random which step it is of, and that it is of none."""

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
        """Tell that no step is on its way."""
        self.objective.step = None


class StopDiverged(TrainerCallback):
    """Saves a checkpoint and stops a run that has diverged.

    Args:
        find_reason: called after every step; what tells that it has, or None.

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
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True


class SaveOnInterrupt(TrainerCallback):
    """Saves a checkpoint and stops after the current step when a signal arrives.

    SIGINT is Ctrl-C, SIGTERM and SIGUSR1 are what Slurm sends before a job's time is over
    (``sbatch --signal``).

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
        """Ask the Trainer for a checkpoint and an end, once a signal has arrived."""
        if self._received_anywhere(args):
            # The losses since the last log entry are not in the checkpoint.
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _received_anywhere(self, args: TrainingArguments) -> str | None:
        """Return the signal; processes that train together stop after the same step."""
        if args.world_size > 1:
            number = signal.Signals[self.received] if self.received else 0
            shared = torch.tensor(int(number), device=args.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            if shared.item():
                self.received = signal.Signals(int(shared.item())).name
        return self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class Costs(TrainerCallback, ExportableState):
    """Counts what training has taken, before an interruption too.

    Attributes:
        forward_passes: of training, one for each batch in this process, those of probes too; dev
            losses and metrics are not in it.
        backward_passes: likewise.
    """

    def __init__(self) -> None:
        self.forward_passes = self.backward_passes = 0
        self._before = 0.0
        self._started = self._step_began = time.perf_counter()
        # Of the steps since the last entry of the log.
        self._in_steps, self._steps = 0.0, 0

    def go_on(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint has counted.

        Args:
            saved: content of its ``trainer_state.json``.
        """
        counted = saved.get("stateful_callbacks", {}).get("Costs", {}).get("attributes", {})
        self._before = counted.get("seconds", 0.0)
        self.forward_passes = counted.get("forward_passes", 0)
        self.backward_passes = counted.get("backward_passes", 0)

    @property
    def seconds(self) -> float:
        """The seconds until now, to a thousandth, dev losses and checkpoints included."""
        return round(self._before + time.perf_counter() - self._started, 3)

    def passes(self) -> dict[str, int]:
        """Return the passes until now, backward ones if there are any."""
        backward = {"backward_passes": self.backward_passes} if self.backward_passes else {}
        return {"forward_passes": self.forward_passes, **backward}

    def logged(self) -> dict[str, float]:
        """Return what an entry of the log gets, with the seconds of a step since the one before."""
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

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves."""
        return {"args": {}, "attributes": {"seconds": self.seconds, **self.passes()}}


class RunningLosses(TrainerCallback, ExportableState):
    """Keeps in checkpoints what the log of the steps after them needs: the losses since its entry.

    Args:
        save: returns it, as JSON has it.
        load: takes it back.

    Attributes:
        saved: ``trainer_state.json`` of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        save: Callable[[], dict[str, Any]] = dict,
        load: Callable[[dict[str, Any]], None] = dict.copy,
    ) -> None:
        self.save, self.load = save, load
        self.saved: Mapping[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves."""
        return {"args": {}, "attributes": {"losses": self.save()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what the checkpoint has, which one of an earlier version has not."""
        own = self.saved.get("stateful_callbacks", {}).get("RunningLosses", {})
        if "losses" in own.get("attributes", {}):
            self.load(own["attributes"]["losses"])
        state.stateful_callbacks.setdefault("RunningLosses", self.state())


class LogLines(TrainerCallback):
    """A line for every entry of the log, with its step, where there is no progress bar."""

    def __init__(self, objective: ShownObjective) -> None:
        super().__init__()
        self.objective = objective
        self._began, self._first = time.perf_counter(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where the run begins, or goes on."""
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
        if "loss" in logs:
            self.show(state, shown_values(logs, self.objective))
        if "eval_loss" in logs:
            measured = [f"dev {self.objective.name} {self.objective.text(logs['eval_loss'])}"]
            named = ((name, logs.get(f"eval_{name}")) for name in METRICS)
            measured += [f"{name} {value:.4f}" for name, value in named if value is not None]
            self.write(f"step {state.global_step}: {', '.join(measured)}")

    def show(self, state: TrainerState, values: Mapping[str, str]) -> None:
        """Show the values of a step."""
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        left = (state.max_steps - state.global_step) / max(1, state.global_step - self._first)
        left *= time.perf_counter() - self._began
        time_left = f", {tqdm.format_interval(left)} left" if state.max_steps else ""
        self.write(f"step {state.global_step} of {state.max_steps}: {shown}{time_left}")

    def write(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)


class LossProgress(LogLines, ProgressCallback):
    """The Trainer's progress bar: the training loss in it, each dev loss in a line of its own."""

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Advance the bar of the dev examples."""
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description(f"dev {self.objective.name}", refresh=False)

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
        """Print a line above the bars."""
        tqdm.write(line)


def shown_values(logs: Mapping[str, Any], objective: ShownObjective) -> dict[str, str]:
    """Return the values of a log entry that are shown, under their short names."""
    shown = {objective.name: objective.text(logs["loss"])}
    for name, (short, form) in SHOWN.items():
        if name in logs and (name not in NEWS or logs[name]):
            shown[short] = format(logs[name], form)
    return shown
