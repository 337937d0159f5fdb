"""Callbacks of the Trainer: the state of a run, signals, and what is shown."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import ExportableState

# Entries of the log that are shown, with short names.
SHOWN = {
    "projected_gradient": ("g", ".3g"),
    "curvature": ("c", ".3g"),
    "hessian_mean": ("h", ".4g"),
    "learning_rate": ("η", ".2g"),
    "broadcast_rate": ("κ", ".2g"),
    "skipped_steps": ("skipped", "d"),
}
METRICS = ("accuracy", "reward", "f1", "em")


@dataclass(eq=False)
class RunState(TrainerCallback, ExportableState):
    """Keeps in checkpoints what transformers' own state lacks."""

    save: Callable[[], dict[str, Any]]  # returns it, as JSON has it
    begin: Callable[[dict[str, Any] | None], None]  # takes it before the first step

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves."""
        return {"args": {}, "attributes": self.save()}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Take back what the checkpoint has."""
        self.begin(run_state(vars(state)) if state.global_step else None)


def run_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``RunState`` has kept in a trainer's state; nothing if another program did it."""
    return state["stateful_callbacks"].setdefault("RunState", {}).get("attributes", {})


class Reports(TrainerCallback):
    """Gives TensorBoard and W&B a run's settings and, after training, its metrics.

    The Trainer's own ``callbacks`` report its arguments and its log alone. This one holds no model.
    """

    def __init__(self, settings: Mapping[str, Any], callbacks: Iterable[TrainerCallback]) -> None:
        kinds = TensorBoardCallback, WandbCallback
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.reporters = [each for each in callbacks if isinstance(each, kinds)]
        self._run: tuple[Any, ...] = ()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Report the settings."""
        self._run = args, state, control
        for each in self.reporters if state.is_world_process_zero else ():
            if isinstance(each, WandbCallback):
                each._wandb.config.update(self.settings, allow_val_change=True)
            else:
                text = json.dumps(self.settings, indent=2, default=str)
                each.tb_writer.add_text("settings", text)

    def metrics(self, named: Mapping[str, float]) -> None:
        """Report metrics of the final model."""
        for each in self.reporters if self._run else ():
            each.on_log(*self._run, logs=dict(named))


class SaveOnInterrupt(TrainerCallback):
    """Saves a checkpoint and stops after the current step when a signal arrives (``received``).

    SIGINT is Ctrl-C. Slurm sends SIGTERM, or SIGUSR1 (``sbatch --signal``), before a job ends.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: str | None = None  # its name
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Listen for the signals."""
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """Stop once a signal has arrived; processes that train together stop after one step."""
        if args.world_size > 1:
            number = signal.Signals[self.received] if self.received else 0
            shared = torch.tensor(int(number), device=args.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            self.received = signal.Signals(int(shared)).name if shared else None
        if self.received:
            save_and_stop(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the signals' handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def save_and_stop(control: TrainerControl) -> None:
    """Ask the Trainer for a checkpoint, for the losses since the last log entry, and for an end."""
    control.should_log = control.should_save = control.should_training_stop = True


class LogLines(TrainerCallback):
    """A line for every entry of the log, in place of the Trainer's dictionaries."""

    def __init__(self, name: str, sign: int) -> None:
        """Take the objective's name, and -1 where it is maximised."""
        super().__init__()
        self.name, self.sign = name, sign

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any
    ) -> None:
        """Show the training loss or the dev loss, whichever the entry has."""
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            values = {self.name: f"{self.sign * float(logs['loss']):.4f}"}
            for long, (short, form) in SHOWN.items():
                if long in logs and (long != "skipped_steps" or logs[long]):
                    values[short] = format(logs[long], form)
            left = ""
            if "seconds_per_step" in logs:
                seconds = (state.max_steps - state.global_step) * logs["seconds_per_step"]
                left = f", {tqdm.format_interval(seconds)} left"
            self.show(f"step {state.global_step} of {state.max_steps}", values, left)
        if "eval_loss" in logs:
            measured = [f"dev {self.name} {self.sign * float(logs['eval_loss']):.4f}"]
            measured += [f"{m} {logs[f'eval_{m}']:.4f}" for m in METRICS if f"eval_{m}" in logs]
            tqdm.write(f"step {state.global_step}: {', '.join(measured)}")  # above a bar

    def show(self, step: str, values: Mapping[str, str], left: str) -> None:
        """Show the values of a step, and the time that is left if it is known."""
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        print(f"{step}: {shown}{left}", flush=True)


class LossProgress(LogLines, ProgressCallback):
    """The Trainer's progress bar with the training loss in it; dev losses are lines above it."""

    def show(self, step: str, values: Mapping[str, str], left: str) -> None:
        """Show the values of a step in the bar."""
        if self.training_bar is not None:
            self.training_bar.set_postfix(values)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Close the bar, if training had begun."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
