"""A transformers.Trainer that loses nothing: whole checkpoints, and runs that resume from them."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    SaveStrategy,
    TrainOutput,
    rotate_checkpoints,
)

from language_model.streaming import load_if_streamed_or_renamed
from language_model.weight_files import tied_weights
from training import checkpoints
from training.callbacks import RunState, run_state
from training.processes import from_first_process
from utils import InputError, NotWritten, first_line, speaks_for_all

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())
# ``_begin`` takes the new intervals, and other batches are refused before training.
logging.getLogger("transformers.trainer_utils").addFilter(
    lambda record: "`trainer_state.json`" not in record.getMessage()
)


class Costs:
    """Counts what training has taken, before an interruption too.

    ``forward_passes`` and ``backward_passes`` are of training in this process, those of probes
    included; not those of dev losses and metrics.
    """

    def __init__(self) -> None:
        self.forward_passes = self.backward_passes = 0
        self._before = 0.0
        self._started = time.perf_counter()
        self._step_began: float | None = None
        self._is_warm = False
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

    def begin(self, saved: Mapping[str, Any] | None = None) -> None:
        """Start the clock; ``saved`` are the seconds and passes of a checkpoint."""
        self._started = time.perf_counter()
        if saved:
            self._before, self.forward_passes = saved["seconds"], saved["forward_passes"]
            self.backward_passes = saved.get("backward_passes", 0)

    def begin_step(self) -> None:
        """Note when a step begins; a further batch of the step changes nothing."""
        self._step_began = self._step_began or time.perf_counter()

    def end_step(self) -> None:
        """Count a step's time; the first one's compiles kernels and measures what is auto."""
        if self._is_warm:
            self._in_steps += time.perf_counter() - self._step_began
            self._steps += 1
        self._is_warm, self._step_began = True, None

    def logged(self) -> dict[str, float]:
        """Return what an entry of the log gets, with the seconds of a step since the last one."""
        costs: dict[str, float] = {**self.passes(), "seconds": self.seconds}
        if self._steps:
            costs["seconds_per_step"] = round(self._in_steps / self._steps, 6)
        self._in_steps, self._steps = 0.0, 0
        return costs


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints are whole or not there, and whose runs resume where they were.

    Args:
        settings: of the run; checkpoints keep them.
        **kwargs: of ``transformers.Trainer``.
    """

    def __init__(self, *, settings: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.settings, self.costs = dict(settings or {}), Costs()
        self._resumed_from: str | None = None
        # RunState does it.
        kwargs["args"].restore_callback_states_from_checkpoint = False
        super().__init__(**kwargs)
        self.add_callback(RunState(self._run_state, self._begin))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train; a checkpoint that has the last step already is only loaded.

        Raises:
            InputError: torch refuses a file of the checkpoint.
        """
        self._resumed_from = resume_from_checkpoint
        if resume_from_checkpoint:
            path = Path(resume_from_checkpoint, checkpoints.STATE)
            state = TrainerState.load_from_json(str(path))
            if self._steps_of_run(state) <= state.global_step:
                # The Trainer would take one step more.
                return self._load_finished(state)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except (UnpicklingError, InputError, NotWritten, KeyboardInterrupt) as error:
            # Close progress bars, restore the handlers of signals.
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            if not isinstance(error, UnpicklingError):
                raise
            reason = f"torch refuses one of its files ({first_line(error)}); {checkpoints.ANOTHER}"
            raise InputError(f"{resume_from_checkpoint}: {reason}") from error

    def _steps_of_run(self, saved: TrainerState) -> int:
        """Return how many steps the run has with the batches of a checkpoint."""
        if self.args.auto_find_batch_size:
            self._train_batch_size = saved.train_batch_size  # as the Trainer does
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _load_finished(self, state: TrainerState) -> TrainOutput:
        """Load a checkpoint of the last step, or the best one beside it."""
        self.state = state
        self._begin(run_state(vars(state)))
        self._load_from_checkpoint(self._resumed_from)
        if self.args.load_best_model_at_end:
            self._load_best_model()
        return TrainOutput(state.global_step, math.nan, {})

    def _run_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this run."""
        return {
            "version": checkpoints.CHECKPOINT_VERSION,
            "settings": self.settings,
            "costs": {"seconds": self.costs.seconds, **self.costs.passes()},
            "best_by": self._best_by,
        }

    def _begin(self, saved: dict[str, Any] | None) -> None:
        """Begin, with what a checkpoint of this version has kept."""
        if saved is None:
            self.costs.begin()
            return
        checkpoints.check_version(self._resumed_from, saved)
        self.costs.begin(saved["costs"])
        # The Trainer keeps the checkpoint's intervals.
        self.state.compute_steps(self.args, self.state.max_steps)
        self._forget_best_by(saved.get("best_by", self._best_by))
        if self.state.best_global_step is None or self.args.save_strategy == SaveStrategy.NO:
            return
        # The best one lies beside the one that the run resumes from, wherever the folder is now.
        best = self._best_beside(Path(self._resumed_from))
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        else:
            logger.warning("the best checkpoint, %s, is gone", best)

    @property
    def _best_by(self) -> str | None:
        """What the best checkpoint is best by, None if none is looked for."""
        metric = self.args.metric_for_best_model
        return metric and metric.removeprefix("eval_")

    def _forget_best_by(self, metric: str | None) -> None:
        """Forget what was best by another metric: the values cannot be compared."""
        state, now = self.state, self._best_by
        if metric == now:
            return
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if now:
            logger.warning(
                "the best %s until step %d is not known: the best checkpoint is a later one",
                *(now, state.global_step),
            )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With --save_strategy best this alone decides what is saved, ``save_and_stop`` or not.
        return super()._determine_best_metric(metrics, trial) or self.control.should_save

    def _best_beside(self, checkpoint: Path) -> Path:
        return checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder, model = Path(resume_from_checkpoint), model or self.model
        if not load_if_streamed_or_renamed(model, folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        reason = from_first_process(lambda: checkpoints.damage(Path(best))) if best else None
        if reason:
            logger.warning(
                "the best checkpoint, %s, is damaged (%s): the last weights stay", best, reason
            )
            self.state.best_model_checkpoint = None
        elif best:
            self._load_from_checkpoint(best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; where one process cannot, all of them raise ``NotWritten``."""
        write = functools.partial(super().save_model, output_dir, _internal_call)
        checkpoints.write_together(Path(output_dir or self.args.output_dir), write)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

        write = functools.partial(super()._save_checkpoint, model, trial)
        checkpoints.write_checkpoint(folder, write, writes_manifest=self.args.should_save)
        best = self._best_beside(folder)
        if best.is_dir():  # otherwise it lies beside the checkpoint that the run resumed from
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            limit = self.args.save_total_limit
            rotate_checkpoints(
                str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _get_output_dir(self, trial: Any) -> str:
        # Where the Trainer writes a checkpoint, and at the end looks for those to delete: none.
        return str(Path(self.args.output_dir, checkpoints.UNFINISHED))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Tied weights are saved once and arrive with the tensor they are tied to.
        tied = tied_weights(self.model)
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)
