"""Training through transformers.Trainer: objectives, schedules, dev metrics, checkpoints.

The Trainer's loop is not copied. It calls ``training_step``, then ``optimizer.step()``, the
scheduler, callbacks, logging, evaluation and checkpoints; ``zeroth_order.ZerothOrderTrainer`` puts
the forward passes into ``training_step`` and leaves the rest to it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
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
)

from language_model.manifest import damage
from language_model.objectives import (
    NegativeTextMetric,
    Objective,
    language_model_loss,
    negative_accuracy,
)
from language_model.tensor_parallel import load_parts, parts_of, whole_state_dict
from language_model.weight_names import load_renamed_weights, tied_weights
from training.callbacks import (
    Costs,
    LogLines,
    LossProgress,
    ShownObjective,
    StopDiverged,
    TellStep,
)
from training.checkpoints import (
    best_checkpoint,
    from_first_process,
    read_trainer_state,
    remove_older_checkpoints,
    weight_files,
    write_checkpoint,
    write_together,
)
from utils import Disagreement, InputError, NotWritten

logger = logging.getLogger(__name__)

# A run has diverged if this many steps in a row have a loss that lies this many times the first one
# (or 1) above it.
RISEN_STEPS, RISEN = 50, 2.0


def shown_objective(objective: Objective) -> ShownObjective:
    """Return how an objective is called where people read it."""
    if isinstance(objective, NegativeTextMetric):
        return ShownObjective(objective.metric, -1)
    return ShownObjective("accuracy", -1) if objective is negative_accuracy else ShownObjective()


def load_as_saved(model: nn.Module, folder: Path) -> bool:
    """Load a checkpoint's weights where the Trainer's own way would not; tell whether it was done.

    So it is with a model in parts, and with one whose files have other names than its weights.
    """
    if parts_of(model):
        load_parts(model, weight_files(folder))
        return True
    return load_renamed_weights(model, folder)


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
        self.max_skipped_steps = max_skipped_steps
        arguments = kwargs["args"]
        if arguments.n_gpu > 1:
            # DataParallel would cut a batch's tensors apart, and multiplies the batch size.
            arguments._n_gpu = 1
        if arguments.load_best_model_at_end and arguments.save_total_limit == 1:
            # With 1 the Trainer deletes the last checkpoint at the end, from which an interrupted
            # run goes on. Until then it keeps 2 as well, the best and the last.
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

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train; a checkpoint that has reached ``max_steps`` already is loaded and left at that."""
        self._resumed_from = resume_from_checkpoint
        saved = read_trainer_state(resume_from_checkpoint) if resume_from_checkpoint else None
        self.costs.go_on(saved or {})
        if saved:
            logged = [row.get("skipped_steps", 0) for row in saved["log_history"]]
            self._skipped_steps = max(logged, default=0)
            first = (row["first_loss"] for row in saved["log_history"] if "first_loss" in row)
            self._first_loss = next(first, None)
        if not saved or not 0 < self.args.max_steps <= saved["global_step"]:
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except (InputError, NotWritten, Disagreement, KeyboardInterrupt):
                # Close progress bars, give signals back.
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise
        # The Trainer would go one step further.
        state_file = Path(resume_from_checkpoint) / "trainer_state.json"
        self.state = TrainerState.load_from_json(str(state_file))
        self._find_best_checkpoint()
        if self.args.load_best_model_at_end:
            self._forget_damaged_best_checkpoint()
            resume_from_checkpoint = self.state.best_model_checkpoint or resume_from_checkpoint
        self._load_from_checkpoint(resume_from_checkpoint, self.model)
        return TrainOutput(self.state.global_step, math.nan, {})

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not load_as_saved(model or self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self._find_best_checkpoint()

    def _find_best_checkpoint(self) -> None:
        saves = self.args.save_strategy != SaveStrategy.NO
        self.state.best_model_checkpoint = best_checkpoint(
            Path(self._resumed_from), self.state.best_global_step if saves else None
        )

    def _forget_damaged_best_checkpoint(self) -> None:
        best = self.state.best_model_checkpoint
        reason = from_first_process(lambda: damage(Path(best))) if best else None
        if reason:
            logger.warning(
                "the best checkpoint, %s, is not whole (%s): the last weights stay", best, reason
            )
            self.state.best_model_checkpoint = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; where one process cannot, all of them raise ``NotWritten``."""
        write = functools.partial(super().save_model, output_dir, _internal_call)
        write_together(Path(output_dir or self.args.output_dir), write)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if parts_of(self.model):
            # All processes come here; the first one writes the whole.
            state_dict = whole_state_dict(self.model)
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial), name)
        write = functools.partial(super()._save_checkpoint, model, trial)
        # The Trainer would delete older checkpoints before this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            write_checkpoint(folder, write, writes_manifest=self.args.should_save)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            remove_older_checkpoints(folder, limit, self.state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        self._forget_damaged_best_checkpoint()
        if self.state.best_model_checkpoint is None:
            return
        if not load_as_saved(self.model, Path(self.state.best_model_checkpoint)):
            super()._load_best_model()

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
        # Not as DistributedDataParallel: processes may have different numbers of batches. Of
        # sharded weights every forward pass needs all: there all processes run all of them.
        whole_weights = not self.is_fsdp_enabled and parts_of(self.model) is None
        processes = self.args.world_size if whole_weights else 1
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
