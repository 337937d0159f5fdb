"""Training through transformers.Trainer: the option loss, and the zeroth-order step.

The Trainer's loop is not copied. It calls ``training_step``, then ``optimizer.step()``, the
scheduler, callbacks, logging, evaluation and checkpoints; ``ZerothOrderTrainer`` puts the forward
passes into ``training_step`` and leaves the rest to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.optimization import get_scheduler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from checkpoints import read_trainer_state
from hizoo import HiZOO
from language_model.loading import load_renamed_weights, tied_weights
from language_model.objectives import Objective, language_model_loss
from layerwise import LayerwiseWeights
from utils import InputError

SMOOTHING_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class SmoothingSchedule:
    """Hessian smoothing α over the steps of a run: ``value`` times a factor that falls from 1 to 0.

    ``parse`` reads ``--hessian_smooth_type``: ``constant1e-8``, ``linear1e-6``, ``cosine1e-6``.
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> SmoothingSchedule:
        """Read a schedule.

        Raises:
            InputError: it is none, or its number is not in [0, 1).
        """
        match = re.fullmatch(rf"({'|'.join(SMOOTHING_SCHEDULES)})(.+)", text)
        try:
            value = float(match[2]) if match else math.nan
        except ValueError:
            value = math.nan
        if not match or not 0 <= value < 1:
            kinds = ", ".join(f"{kind}<number>" for kind in SMOOTHING_SCHEDULES)
            raise InputError(
                f"--hessian_smooth_type {text}: give one of {kinds}, the number from 0 (MeZO) to "
                "below 1, as in constant1e-8"
            )
        return cls(match[1], value)

    def at(self, step: int, max_steps: int) -> float:
        """Return α at a step, counted from 0."""
        return self.value * SMOOTHING_SCHEDULES[self.kind](min(1.0, step / max(1, max_steps)))


@dataclass(frozen=True)
class ZerothOrderSettings:
    """What ``--trainer zo`` is told, beside the Trainer's own arguments; see ``hizoo.HiZOO``.

    Attributes:
        smoothing: α over the steps.
        eps: perturbation scale μ.
        hessian: "full" or "lowrank".
        hessian_dtype: of the full h; None: that of the weights, bfloat16 for float16.
        perturbation: "inplace", "layerwise" or "auto": layerwise where weights are half precision.
        num_samples: directions a step.
        compile: whether kernels are compiled; None: for 16 million weights and more.
        max_skipped_steps: steps in a row without a finite loss, after which the run stops.
    """

    smoothing: SmoothingSchedule
    eps: float = 1e-3
    hessian: str = "full"
    hessian_dtype: torch.dtype | None = None
    perturbation: str = "auto"
    num_samples: int = 1
    compile: bool | None = None
    max_skipped_steps: int = 50


class ObjectiveTrainer(Trainer):
    """First-order training on an objective; ``data_collator`` makes the batches that it takes.

    Args:
        objective: what becomes small, one of objectives.py.
        decay_step: the learning rate stays constant until this step and decays from there on, with
            the scheduler ``linear`` or ``cosine``; 0: the scheduler's own start.
        **kwargs: of ``transformers.Trainer``.
    """

    diverged = False

    def __init__(self, *, objective: Objective, decay_step: int = 0, **kwargs: Any) -> None:
        self.objective = objective
        self.decay_step = decay_step
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
            raise InputError("--fsdp shards the weights over GPUs, there are none: leave it out")
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossProgress)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train; a checkpoint that has reached ``max_steps`` already is loaded and left at that."""
        saved = read_trainer_state(resume_from_checkpoint) if resume_from_checkpoint else None
        if not saved or not 0 < self.args.max_steps <= saved["global_step"]:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        # The Trainer would go one step further.
        state_file = Path(resume_from_checkpoint) / "trainer_state.json"
        self.state = TrainerState.load_from_json(str(state_file))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best and Path(best).is_dir():
            resume_from_checkpoint = best
        self._load_from_checkpoint(resume_from_checkpoint, self.model)
        return TrainOutput(self.state.global_step, math.nan, {})

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not load_renamed_weights(model or self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not load_renamed_weights(self.model, Path(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective of a batch."""
        loss = self.objective(model, inputs)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the dev loss, the same for every batch size and every number of processes.

        The Trainer's loop counts a batch's mean once for each example, also for those repeated ones
        that fill up the last batch. Predictions are ``prediction.predict``'s.
        """
        # Not as DistributedDataParallel: processes may have different numbers of batches. Sharded
        # weights are gathered by every forward pass: there all processes run all of them.
        processes = 1 if self.is_fsdp_enabled else self.args.world_size
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        dataset, size = dataloader.dataset, self.args.eval_batch_size
        by_token = self.objective is language_model_loss
        own = range(self.args.process_index % processes, len(dataset), processes)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(own), size):
            examples = [dataset[index] for index in own[start : start + size]]
            batch = self.data_collator(examples)
            weight = len(batch["targets"]) if by_token else len(examples)
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
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": total / weights},
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


class ZerothOrderTrainer(ObjectiveTrainer):
    """HiZOO, or MeZO with a smoothing of 0: forward passes in ``training_step``, no gradient.

    Under ``torchrun`` every process runs its own part of the batch; the losses are averaged and the
    noise is the same everywhere, so the processes keep the same weights without exchanging them.
    """

    def __init__(self, *, settings: ZerothOrderSettings, **kwargs: Any) -> None:
        self.settings = settings
        super().__init__(**kwargs)
        # Nothing has a gradient that could be clipped.
        self.args.max_grad_norm = 0.0
        self.finite_losses = StopWithoutFiniteLoss(settings.max_skipped_steps)
        self.add_callback(self.finite_losses)

    def create_optimizer(self, model: nn.Module | None = None) -> HiZOO:
        """Create the optimizer; biases and layer norms do not decay."""
        if self.optimizer is None:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            matrices = {n for n, p in trained if p.dim() > 1}  # some norms go by unusual names
            decaying = matrices & set(self.get_decay_parameter_names(self.model))
            groups = [
                {
                    "params": [p for n, p in trained if (n in decaying) == decays],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for decays in (True, False)
            ]
            settings = self.settings
            layerwise = settings.perturbation == "layerwise"
            if settings.perturbation == "auto":
                layerwise = any(p.element_size() < 4 for _, p in trained)
            self.optimizer = HiZOO(
                [group for group in groups if group["params"]],
                lr=self.args.learning_rate,
                eps=settings.eps,
                hessian_smooth=settings.smoothing.at(0, 1),
                hessian=settings.hessian,
                hessian_dtype=settings.hessian_dtype,
                num_samples=settings.num_samples,
                layers=LayerwiseWeights(self.model) if layerwise else None,
                seed=self.args.seed,
                compile=settings.compile,
            )
        return self.optimizer

    @property
    def diverged(self) -> bool:
        """Whether the run was stopped since its losses were not finite any more."""
        return self.finite_losses.stopped

    @property
    def hizoo(self) -> HiZOO:
        """The optimizer itself, without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run the forward passes of one batch; the Trainer then calls ``optimizer.step()``."""
        # The perturbed losses must differ by the perturbation alone, not by dropout.
        model.eval()
        inputs = self._prepare_inputs(inputs)
        smooth = self.settings.smoothing.at(self.state.global_step, self.state.max_steps)
        for group in self.hizoo.param_groups:
            group["hessian_smooth"] = smooth

        def batch_loss() -> Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, inputs)
            return self.accelerator.reduce(loss, "mean")

        loss = self.hizoo.estimate(batch_loss) / self.current_gradient_accumulation_steps
        return torch.tensor(loss, device=self.args.device)

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: Any = None
    ) -> nn.Module:
        # Without gradients there is nothing for DistributedDataParallel to exchange.
        return model

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """No gradient, no norm: the log shows the projected gradient instead."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the optimizer's scalars beside the training loss."""
        if "loss" in logs:
            logs["projected_gradient"] = self.hizoo.projected_gradient
            logs["curvature"] = self.hizoo.curvature
            logs["hessian_mean"], logs["hessian_max"] = self.hizoo.hessian_mean_and_max()
            logs["skipped_steps"] = self.hizoo.skipped_steps
        super().log(logs, start_time)


class StopWithoutFiniteLoss(TrainerCallback):
    """Saves a checkpoint and stops when too many steps in a row had a loss that is not finite.

    Attributes:
        stopped: whether it did.
    """

    def __init__(self, max_skipped_steps: int) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.stopped = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the optimizer's count."""
        if optimizer.param_groups[0]["skipped_in_a_row"] >= self.max_skipped_steps:
            self.stopped = True
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True


class LossProgress(ProgressCallback):
    """The Trainer's progress bar, with the loss in it instead of a line for every log entry."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the training loss in the bar, and each dev loss in a line of its own."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            shown = {"loss": f"{float(logs['loss']):.4f}"}
            if "curvature" in logs:
                shown["g"] = f"{logs['projected_gradient']:.3g}"
                shown["c"] = f"{logs['curvature']:.3g}"
                shown["h"] = f"{logs['hessian_mean']:.4g}"
            if logs.get("skipped_steps"):
                shown["skipped"] = f"{logs['skipped_steps']}"
            self.training_bar.set_postfix(shown)
        if "eval_loss" in logs:
            tqdm.write(f"step {state.global_step}: dev loss {float(logs['eval_loss']):.4f}")
