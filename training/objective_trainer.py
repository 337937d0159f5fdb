"""First-order training through transformers.Trainer: objectives, the dev loss, schedules."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback
from transformers.optimization import get_scheduler
from transformers.trainer_utils import EvalLoopOutput

from language_model.objectives import (
    NegativeTextMetric,
    Objective,
    language_model_loss,
    negative_accuracy,
)
from training.callbacks import LogLines, LossProgress, save_and_stop
from training.checkpoints import checkpoints, note_step, noted_step
from training.resumable_trainer import ResumableTrainer
from utils import InputError, share_of_run, speaks_for_all

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())
# A run has diverged if so many losses in a row lie above the first one by so many times the first
# one (or 1).
RISEN_STEPS, RISEN = 50, 2.0
# So does one without a finite loss in so many steps in a row.
SKIPPED_STEPS = 50


def shown_as(objective: Objective) -> tuple[str, int]:
    """Return an objective's name, and its sign: -1 where it is maximised."""
    if isinstance(objective, NegativeTextMetric):
        return objective.metric, -1
    return ("accuracy", -1) if objective is negative_accuracy else ("loss", 1)


@dataclass
class Divergence:
    """Counts steps without a finite loss, and tells when a run has diverged."""

    first_loss: float | None = None
    risen_in_a_row: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def look(self, loss: float, was_skipped: bool) -> str | None:
        """Return why the run has diverged, by the loss of a step and whether it was skipped."""
        self.skipped_steps += was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
        if self.first_loss is None or not math.isfinite(self.first_loss):
            self.first_loss = loss  # a later one where the first is not finite
        limit = self.first_loss + RISEN * max(abs(self.first_loss), 1.0)
        self.risen_in_a_row = self.risen_in_a_row + 1 if loss > limit else 0
        if self.skipped_in_a_row >= SKIPPED_STEPS:
            return f"no finite loss in {SKIPPED_STEPS} steps in a row"
        if self.risen_in_a_row >= RISEN_STEPS:
            return (
                f"the loss of each of the last {RISEN_STEPS} steps is above {limit:.3g}, the first "
                f"was {self.first_loss:.3g}"
            )
        return None


class ObjectiveTrainer(ResumableTrainer):
    """First-order training on an objective; ``data_collator`` makes the batches that it takes.

    Batches that are accumulated, or shared between processes, count by what their loss is the mean
    over: a step is that of one large batch. A step whose loss is not finite changes nothing.

    Args:
        objective: what is minimised, one of objectives.py.
        decay_step: the learning rate stays constant until this step, below 1 a fraction of the
            run, and takes the course of the scheduler ``linear``, ``cosine`` or ``polynomial`` from
            there on; 0: from the start.
        dev_metric: measures a model on the dev set, beside the dev loss; returns metrics by name.
        **kwargs: of ``ResumableTrainer``.
    """

    # Whether a resumed run does the steps after its checkpoint again; a journal spares that.
    repeats_steps = True

    def __init__(
        self,
        *,
        objective: Objective,
        decay_step: float = 0,
        dev_metric: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective, self.dev_metric = objective, dev_metric
        self.decay_step, self.divergence = decay_step, Divergence()
        self.diverged: str | None = None  # why
        self._was_skipped, self._ended_step = False, 0
        arguments = kwargs["args"]
        # DataParallel would cut a batch's tensors apart, and multiplies the batch size.
        arguments._n_gpu = min(1, arguments.n_gpu)
        super().__init__(**kwargs)
        if arguments.fsdp and not self.is_fsdp_enabled:
            # accelerate would train with whole weights in every process, without a word.
            raise InputError("no GPU found: --fsdp shards the weights over GPUs; leave it out")
        self._loss_of_step = torch.zeros((), device=arguments.device)
        # Losses come weighted (compute_loss): the Trainer need not divide them by their number.
        self.model_accepts_loss_kwargs = True
        for theirs, ours in ((ProgressCallback, LossProgress), (PrinterCallback, LogLines)):
            if self.pop_callback(theirs) is not None:
                self.add_callback(ours(*shown_as(objective)))

    # ---- steps

    def _run_state(self) -> dict[str, Any]:
        return super()._run_state() | {"divergence": dict(vars(self.divergence))}

    def _begin(self, saved: dict[str, Any] | None) -> None:
        super()._begin(saved)
        self._ended_step = self.state.global_step
        if saved:
            vars(self.divergence).update(saved["divergence"])
        step, done = self.state.global_step, noted_step(self.args.output_dir)
        is_resumed = saved or not checkpoints(self.args.output_dir)
        if self.repeats_steps and done > step and is_resumed:
            place = "after the checkpoint" if saved else "before the first checkpoint"
            logger.warning(f"steps {step + 1} to {done} came {place}: done again")

    def _begin_step(self) -> None:
        """Note that a batch of a step begins."""
        self.costs.begin_step()
        if isinstance(self.objective, NegativeTextMetric):
            self.objective.step = self.state.global_step

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer comes here after every step, and once more after every epoch.
        if self.state.global_step > self._ended_step:
            self._ended_step = self.state.global_step
            self._end_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _end_step(self) -> None:
        """Count a step's time, and stop a run that has diverged."""
        self.costs.end_step()
        if isinstance(self.objective, NegativeTextMetric):
            self.objective.step = None
        loss = float(self.accelerator.reduce(self._loss_of_step, "mean"))
        self._loss_of_step.zero_()
        self.diverged = self.divergence.look(loss, self.was_skipped())
        if self.repeats_steps and self.args.should_save:
            is_last = self.state.global_step == self.state.max_steps
            note_step(self.args.output_dir, None if is_last else self.state.global_step)
        if self.diverged:
            save_and_stop(self.control)

    def was_skipped(self) -> bool:
        """Whether the last step had no finite loss."""
        return self._was_skipped

    # ---- losses

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

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute gradients of a batch, and count its passes."""
        self._begin_step()
        loss = super().training_step(*args, **kwargs)
        self.costs.forward_passes += 1
        self.costs.backward_passes += 1
        self._loss_of_step += loss.detach()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm; gradients that are not finite are left out, just before the step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._was_skipped = not math.isfinite(float(grad_norm))
        # A scaler of float16 gradients looks for overflow itself, and leaves such steps out.
        if self._was_skipped and self.accelerator.scaler is None:
            # An optimizer leaves alone what has no gradient.
            model.zero_grad(set_to_none=True)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what training has taken, and the number of skipped steps beside its loss."""
        if "loss" in logs or "eval_loss" in logs:
            logs |= self.costs.logged()
        if "loss" in logs:
            logs["skipped_steps"] = self.divergence.skipped_steps
        super().log(logs, start_time)

    # ---- dev loss, log, schedule

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Return the dev loss and metrics, the same for every batch size and number of processes.

        The Trainer's loop counts a batch's mean once for each example, also for those repeated ones
        that fill up the last batch.
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
            batch = self.collate([dataset[index] for index in own[start : start + size]])
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
        metrics = {"loss": total / weights}
        metrics |= self.dev_metric(self.model) if self.dev_metric else {}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(dataset),
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the Trainer's scheduler, or one that is constant until ``decay_step``."""
        if self.lr_scheduler is not None or not self.decay_step:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer, args = optimizer or self.optimizer, self.args
        warmup = args.get_warmup_steps(num_training_steps)
        start = max(warmup, share_of_run(self.decay_step, num_training_steps))
        steps, options = num_training_steps - start, dict(args.lr_scheduler_kwargs or {})
        course = get_scheduler(args.lr_scheduler_type, optimizer, 0, steps, options).lr_lambdas[0]

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            return 1.0 if step < start else course(step - start)

        self.lr_scheduler = LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler
