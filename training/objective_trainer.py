"""Training through transformers.Trainer: objectives, schedules, dev metrics, checkpoints.

transformers' loop calls ``training_step``, ``optimizer.step()``, the scheduler, callbacks, the log,
evaluation and checkpoints.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.optimization import get_scheduler
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    SaveStrategy,
    TrainOutput,
    rotate_checkpoints,
)

from language_model.manifest import damage
from language_model.objectives import (
    NegativeTextMetric,
    Objective,
    language_model_loss,
    negative_accuracy,
)
from language_model.weight_names import load_renamed_weights, tied_weights
from training.callbacks import (
    Costs,
    LogLines,
    LossProgress,
    RunState,
    ShownObjective,
    StopDiverged,
    TellStep,
)
from training.checkpoints import (
    ANOTHER,
    CHECKPOINT_VERSION,
    STATE,
    best_checkpoint,
    write_checkpoint,
    write_together,
)
from training.processes import from_first_process
from utils import Disagreement, InputError, NotWritten, first_line

logger = logging.getLogger(__name__)

# A run has diverged if so many steps in a row have a loss that is above the first one by so many
# times the first one (or 1).
RISEN_STEPS, RISEN = 50, 2.0


def shown_objective(objective: Objective) -> ShownObjective:
    """Return how an objective is shown."""
    if isinstance(objective, NegativeTextMetric):
        return ShownObjective(objective.metric, -1)
    return ShownObjective("accuracy", -1) if objective is negative_accuracy else ShownObjective()


class ObjectiveTrainer(Trainer):
    """First-order training on an objective; ``data_collator`` makes the batches that it takes.

    Batches that are accumulated, or shared between processes, count by what their loss is the mean
    over: a step is that of one large batch. A step whose loss is not finite changes nothing.

    Args:
        objective: what becomes small, one of objectives.py.
        decay_step: the learning rate stays constant until this step and decays from there on, with
            the scheduler ``linear`` or ``cosine``; 0: the scheduler's own start.
        max_skipped_steps: steps in a row without a finite loss, after which the run stops with a
            checkpoint.
        dev_metric: measures a model on the dev set, beside the dev loss; returns metrics by name.
        quiet: show no line of the log.
        **kwargs: of ``transformers.Trainer``.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        decay_step: int = 0,
        max_skipped_steps: int = 50,
        dev_metric: Callable[[nn.Module], dict[str, float]] | None = None,
        quiet: bool = False,
        **kwargs: Any,
    ) -> None:
        self.objective = objective
        self.dev_metric = dev_metric
        self.decay_step = decay_step
        self._skipped_steps = self._skipped_in_a_row = self._risen_in_a_row = 0
        self._first_loss: float | None = None
        self._unfinished: str | None = None  # where a checkpoint is being written
        self.max_skipped_steps = max_skipped_steps
        arguments = kwargs["args"]
        if arguments.n_gpu > 1:
            # DataParallel would cut a batch's tensors apart, and multiplies the batch size.
            arguments._n_gpu = 1
        # RunState restores what the Trainer would make new callbacks for.
        arguments.restore_callback_states_from_checkpoint = False
        if arguments.load_best_model_at_end and arguments.save_total_limit == 1:
            # With 1 the Trainer deletes the last checkpoint at the end, from which an interrupted
            # run resumes. Until then it keeps 2 as well, the best and the last.
            arguments.save_total_limit = 2
        super().__init__(**kwargs)
        if arguments.fsdp and not self.is_fsdp_enabled:
            # accelerate would train with whole weights in every process, without a word.
            raise InputError(
                "no GPU found: --fsdp, which finetune_fsdp.sh adds, shards the weights over GPUs; "
                "run finetune.sh, or leave it out"
            )
        self._finite = torch.ones((), dtype=torch.bool, device=arguments.device)
        self._loss_of_step = torch.zeros((), device=arguments.device)
        # Losses come weighted (compute_loss): the Trainer need not divide them by their number.
        self.model_accepts_loss_kwargs = True
        shown = shown_objective(objective)
        if isinstance(objective, NegativeTextMetric):
            self.add_callback(TellStep(objective))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossProgress(shown))
        if self.pop_callback(PrinterCallback) is not None and not quiet:
            self.add_callback(LogLines(shown))
        self.costs = Costs()
        self.add_callback(self.costs)
        self.add_callback(RunState(self._run_state, self._resume))
        self.stop_diverged = StopDiverged(self._why_diverged)
        self.add_callback(self.stop_diverged)

    @property
    def diverged(self) -> str | None:
        """Why the run was stopped, if its losses were not finite any more or far too large."""
        return self.stop_diverged.reason

    def _why_diverged(self) -> str | None:
        """Look at the losses of the step that has ended."""
        loss = float(self.accelerator.reduce(self._loss_of_step, "mean"))
        self._loss_of_step.zero_()
        if self._first_loss is None:
            self._first_loss = loss
        limit = self._first_loss + RISEN * max(abs(self._first_loss), 1.0)
        self._risen_in_a_row = self._risen_in_a_row + 1 if loss > limit else 0
        if self.skipped_in_a_row() >= self.max_skipped_steps:
            return f"no finite loss in {self.max_skipped_steps} steps in a row"
        if self._risen_in_a_row >= RISEN_STEPS:
            return (
                f"the loss of each of the last {RISEN_STEPS} steps is above {limit:.3g}, the first "
                f"was {self._first_loss:.3g}"
            )
        return None

    def skipped_in_a_row(self) -> int:
        """Return how many of the last steps in a row had no finite loss."""
        return self._skipped_in_a_row

    def skipped_steps(self) -> int:
        """Return how many steps had no finite loss, those before a checkpoint included."""
        return self._skipped_steps

    def warn(self, line: str) -> None:
        """Print a line on the standard error, from one process only."""
        if self.args.process_index == 0:
            logger.warning(line)

    def _run_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this run."""
        return {
            "version": CHECKPOINT_VERSION,
            "costs": {"seconds": self.costs.seconds, **self.costs.passes()},
            "skipped_steps": self._skipped_steps,
            "first_loss": self._first_loss,
            "risen_in_a_row": self._risen_in_a_row,
        }

    def _resume(self, saved: dict[str, Any]) -> None:
        """Take back what a checkpoint has kept.

        Raises:
            InputError: another version of this program wrote the checkpoint.
        """
        if saved.get("version") != CHECKPOINT_VERSION:
            raise InputError(
                f"{self._resumed_from}: another version of this program wrote it; {ANOTHER}"
            )
        self.costs.resume(saved["costs"])
        self._skipped_steps = saved["skipped_steps"]
        self._first_loss, self._risen_in_a_row = saved["first_loss"], saved["risen_in_a_row"]
        saves = self.args.save_strategy != SaveStrategy.NO
        self.state.best_model_checkpoint = best_checkpoint(
            Path(self._resumed_from), self.state.best_global_step if saves else None
        )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train; a checkpoint that has reached ``max_steps`` already is only loaded.

        Raises:
            InputError: torch refuses a file of the checkpoint.
        """
        self._resumed_from = resume_from_checkpoint
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE)))
            if 0 < self.args.max_steps <= state.global_step:
                # The Trainer would take one step more.
                return self._load_finished(state)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except UnpicklingError as error:
            reason = f"torch refuses one of its files ({first_line(error)})"
            raise InputError(f"{resume_from_checkpoint}: {reason}; {ANOTHER}") from error
        except (InputError, NotWritten, Disagreement, KeyboardInterrupt):
            # Close progress bars, restore the handlers of signals.
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise

    def _load_finished(self, state: TrainerState) -> TrainOutput:
        """Load a checkpoint of the last step, or the best one beside it."""
        self.state = state
        self._resume(RunState.read(state))
        if self.args.load_best_model_at_end:
            self._forget_damaged_best_checkpoint()
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or self._resumed_from, self.model)
        return TrainOutput(state.global_step, math.nan, {})

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # Files of some models have other names than their weights.
        if not load_renamed_weights(model or self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._forget_damaged_best_checkpoint()
        best = self.state.best_model_checkpoint
        if best and not load_renamed_weights(self.model, Path(best)):
            super()._load_best_model()

    def _forget_damaged_best_checkpoint(self) -> None:
        best = self.state.best_model_checkpoint
        reason = from_first_process(lambda: damage(Path(best))) if best else None
        if reason:
            logger.warning(
                "the best checkpoint, %s, is damaged (%s): the last weights stay", best, reason
            )
            self.state.best_model_checkpoint = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; where one process cannot, all of them raise ``NotWritten``."""
        write = functools.partial(super().save_model, output_dir, _internal_call)
        write_together(Path(output_dir or self.args.output_dir), write)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

        def write(unfinished: Path) -> None:
            self._unfinished = str(unfinished.parent)
            try:
                super(ObjectiveTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._unfinished = None

        write_checkpoint(folder, write, writes_manifest=self.args.should_save)
        best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        if self.args.should_save:
            limit = self.args.save_total_limit
            rotate_checkpoints(
                str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """Make a batch, as the Trainer does: without columns that the model does not take."""
        return self._get_collator_with_removed_columns(self.data_collator)(examples)

    def batch_weight(self, batch: dict[str, Any]) -> int:
        """Return what the loss of a batch is the mean over: its scored tokens, or its examples.

        Where a batch has neither, batches count alike.
        """
        if self.objective is language_model_loss:
            return len(batch["targets"])
        if "labels" in batch:  # of a data set in the Trainer's own form
            labels = batch["labels"][..., 1:] if self._loss_shifts_labels else batch["labels"]
            return int((labels != -100).sum())
        return next((len(batch[name]) for name in ("correct", "prompts") if name in batch), 1)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor:
        # The Trainer counts labels, which packed batches do not have.
        total = torch.tensor(sum(map(self.batch_weight, batch_samples)), device=device)
        return self.accelerator.reduce(total, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective of a batch, or with ``num_items_in_batch`` its part of a step's."""
        loss = self.objective(model, inputs)
        if num_items_in_batch is not None:
            # Processes average their gradients, which here have to be summed.
            part = self.batch_weight(inputs) / num_items_in_batch
            loss = loss * part * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute gradients of a batch, and see whether its loss is finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.costs.forward_passes += 1
        self.costs.backward_passes += 1
        self._finite = self._finite & torch.isfinite(loss)
        self._loss_of_step += loss.detach()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm; what is not finite is left out, just before the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # A scaler of float16 gradients looks for overflow itself, and leaves such steps out.
        scaled = self.accelerator.scaler is not None
        finite = self._finite & (scaled or math.isfinite(float(grad_norm)))
        # One process whose loss is not finite is enough.
        finite = bool(self.accelerator.reduce(finite.float(), "mean") == 1)
        if not finite and not scaled:
            # An optimizer leaves alone what has no gradient.
            model.zero_grad(set_to_none=True)
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self._skipped_steps += not finite
        self._finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what training has taken, and the number of skipped steps beside its loss.

        The first entry also has the loss of the first step alone, ``first_loss``.
        """
        if "loss" in logs or "eval_loss" in logs:
            logs |= self.costs.logged()
        if "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps()
            if not any("first_loss" in row for row in self.state.log_history):
                logs["first_loss"] = self._first_loss
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the dev loss and metrics, the same for every batch size and number of processes.

        The Trainer's loop counts a batch's mean once for each example, also for those repeated ones
        that fill up the last batch. Predictions are ``prediction.predict``'s.
        """
        # Not as DistributedDataParallel: processes may have different numbers of batches. With
        # sharded weights a forward pass needs all processes, so each runs all of them.
        processes = 1 if self.is_fsdp_enabled else self.args.world_size
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        dataset, size = dataloader.dataset, self.args.eval_batch_size
        own = range(self.args.process_index % processes, len(dataset), processes)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(own), size):
            examples = [dataset[index] for index in own[start : start + size]]
            batch = self.collate(examples)
            weight = self.batch_weight(batch)
            with self.compute_loss_context_manager():
                loss = float(self.compute_loss(self.model, self._prepare_inputs(batch)))
            sums += torch.tensor([loss * weight, weight], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        if processes > 1:
            sums = sums.to(self.args.device)
            torch.distributed.all_reduce(sums)
        total, weights = sums.tolist()
        metrics = self.dev_metric(self.model) if self.dev_metric else {}
        metrics = {"loss": total / weights, **metrics}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(dataset),
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Tied weights are saved once and arrive with the tensor they are tied to.
        tied = tied_weights(self.model)
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the Trainer's scheduler, or one that is constant until ``decay_step``."""
        if self.lr_scheduler is not None or not self.decay_step:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = get_scheduler(
            "warmup_stable_decay",
            optimizer=optimizer or self.optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs={
                "num_decay_steps": num_training_steps - self.decay_step,
                "decay_type": self.args.lr_scheduler_type.value,
            },
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler
