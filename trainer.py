"""The zeroth-order step in transformers.Trainer: its settings, schedules of α, its trainer."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import (
    EvalLoopOutput,
    TrainOutput,
)

from example_directions import ExampleDirections
from hizoo import HiZOO
from language_model.objectives import (
    Objective,
)
from language_model.tensor_parallel import HiZOOOfParts, parts_of
from training.callbacks import (
    RunningLosses,
)
from training.checkpoints import (
    read_trainer_state,
)
from training.journal import Evaluation
from training.objective_trainer import ObjectiveTrainer
from training.perturbing import GatheredLosses, choose_directions, choose_layers, losses_by_example
from training.processes import (
    NOTHING,
    Exchange,
    SharedDirections,
    let_all_have_every_batch,
    own_part,
)
from training.recording import Recording
from utils import InputError
from zeroth_order.layerwise import LayerwiseWeights

# k of --learning_rate auto: of the step at which the loss of a batch is lowest along u.
CURVATURE_PART = 0.1

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
        step_size: "fixed" or "curvature", where the learning rate is k.
        curvature_eps: μ of c; None: that of g.
        curvature_every: steps between two measurements of c; None: see ``HiZOO``.
        clip: bound of |g| in units of its running root mean square; None: none.
        directions: "shared" by all examples of a batch, or "example": each has its own.
        normalize: whether the examples' g are divided by their standard deviation.
        parallel: what several processes share, "batch", "directions" or "weights", which they have
            parts of (language_model/tensor_parallel.py).
        compile: whether kernels are compiled; None: for 16 million weights and more.
    """

    smoothing: SmoothingSchedule
    eps: float = 1e-3
    hessian: str = "full"
    hessian_dtype: torch.dtype | None = None
    perturbation: str = "auto"
    num_samples: int = 1
    step_size: str = "fixed"
    curvature_eps: float | None = None
    curvature_every: int | None = None
    clip: float | None = None
    directions: str = "shared"
    normalize: bool = False
    parallel: str = "batch"
    compile: bool | None = None


class ZerothOrderTrainer(ObjectiveTrainer):
    """HiZOO, or MeZO with a smoothing of 0: forward passes in ``training_step``, no gradient.

    Under ``torchrun`` every process runs its own part of the batch, or of the directions; they
    exchange losses. The noise is the same everywhere, so they keep the same weights without
    exchanging them. Or each has parts of the weights. The batches are those of one process.

    Args:
        settings: of the step.
        recording: of the run's journal; None: no journal.
        **kwargs: of ``ObjectiveTrainer``.
    """

    def __init__(
        self, *, settings: ZerothOrderSettings, recording: Recording | None = None, **kwargs: Any
    ) -> None:
        self.settings = settings
        self.recording = recording or Recording()
        self.running_losses = RunningLosses(self._save_losses, self._load_losses)
        super().__init__(**kwargs)
        # The Trainer makes them as training begins, and asks callbacks for their state before.
        self._tr_loss, self._globalstep_last_logged = torch.zeros(()), 0
        self.exchange = Exchange(self.args.device)
        self._shares_batch = settings.parallel == "batch"
        self._logged = (0, 0)  # bytes that were exchanged, and steps
        self.add_callback(self.running_losses)
        self.add_callback(self.recording)
        # Nothing has a gradient that could be clipped.
        self.args.max_grad_norm = 0.0

    def create_optimizer(self, model: nn.Module | None = None) -> HiZOO:
        """Create the optimizer; biases and layer norms do not decay."""
        if self.optimizer is None:
            layers, directions = self.choose_perturbation()
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
            settings, parts = self.settings, parts_of(self.model)
            self.optimizer = (HiZOOOfParts if parts else HiZOO)(
                [group for group in groups if group["params"]],
                lr=self.args.learning_rate,
                eps=settings.eps,
                hessian_smooth=settings.smoothing.at(0, 1),
                hessian=settings.hessian,
                hessian_dtype=settings.hessian_dtype,
                num_samples=settings.num_samples,
                step_size=settings.step_size,
                curvature_eps=settings.curvature_eps,
                curvature_every=settings.curvature_every,
                clip=settings.clip,
                layers=layers,
                directions=directions,
                shards=parts,
                normalize=settings.normalize,
                seed=self.args.seed,
                compile=settings.compile,
            )
            if self.args.world_size > 1 and settings.parallel == "directions":
                self.optimizer.shares = SharedDirections(
                    settings.num_samples,
                    self.exchange,
                    lambda: self.recording.is_replaying,
                    self.recording.note,
                )
            try:
                self.optimizer.check_perturbation_scale()
            except ValueError as error:
                raise InputError(f"--zo_eps {settings.eps:g}: {error}") from error
        return self.optimizer

    def choose_perturbation(self) -> tuple[LayerwiseWeights | None, ExampleDirections | None]:
        """Return what perturbs one module at a time, and what does example by example, if any.

        Raises:
            InputError: it was asked for and does not work for this model.
        """
        model, settings = self.model.eval(), self.settings

        def loss(of: Objective) -> Tensor:
            with self.compute_loss_context_manager():
                return of(model, self._prepare_inputs(self.first_batch()))

        if settings.directions == "shared":
            whole = functools.partial(loss, self.objective)
            return choose_layers(model, settings.perturbation, whole, self.warn), None
        losses = functools.partial(loss, losses_by_example(self.objective))
        return None, choose_directions(model, settings.eps, losses, self.warn)

    @property
    def examples_of_a_batch(self) -> int:
        """The examples of a batch in all processes together."""
        return self._train_batch_size * (self.args.world_size if self._shares_batch else 1)

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of one process, as large as all processes' together, or parts."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        collate = self.data_collator
        if self._shares_batch:
            self.data_collator = functools.partial(own_part, collate)
        try:
            loader = self._get_dataloader(
                self.train_dataset,
                "Training",
                self.examples_of_a_batch,
                self._get_train_sampler,
                is_training=True,
            )
        finally:
            self.data_collator = collate
        return let_all_have_every_batch(loader)

    def batch_weight(self, batch: dict[str, Any]) -> int:
        """Return what the loss of a batch is the mean over; 0 where another process has it."""
        return 0 if NOTHING in batch else super().batch_weight(batch)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor:
        weights = sum(map(self.batch_weight, batch_samples))
        return self._sum_of_parts(torch.tensor(weights, device=device))

    def _sum_of_parts(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes' parts of the batch."""
        return self.exchange.sum(tensor) if self._shares_batch else tensor

    def first_batch(self) -> dict[str, Any]:
        """Return the first examples, unshuffled, as one batch; the same in every process."""
        examples = itertools.islice(self.train_dataset, self.args.per_device_train_batch_size)
        return self.collate(list(examples))

    @torch.no_grad()
    def loss_along(self, batch: int, direction: int, distance: float) -> float:
        """Return the loss of a shuffled batch at θ + ``distance`` u/√h, the same in every process.

        The directions differ from the step's. Call ``self.optimizer.restore()`` afterwards.
        """
        self.model.eval()
        size, count = self.examples_of_a_batch, len(self.train_dataset)
        order = np.random.RandomState(self.args.seed).permutation(count)
        chosen = order[np.arange(batch * size, (batch + 1) * size) % count]

        def loss() -> Tensor:
            inputs = self.collate([self.train_dataset[int(i)] for i in chosen])
            with self.compute_loss_context_manager():
                value = self.compute_loss(self.model, self._prepare_inputs(inputs))
            return self.accelerator.reduce(value, "mean")

        self.costs.forward_passes += 1
        return self.optimizer.loss_along(loss, distance, self.settings.num_samples + direction)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Return the dev metrics; those that are in the journal are not computed again."""
        step = self.state.global_step
        recorded = self.recording.evaluation(step)
        if recorded is not None:
            return EvalLoopOutput(None, None, recorded, len(self.eval_dataset))
        output = super().evaluation_loop(*args, **kwargs)
        self.recording.write(Evaluation(step, dict(output.metrics)))
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            # The Trainer does not note it where there are no checkpoints.
            self.state.best_global_step = self.state.global_step
        return is_best

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, with the losses before a checkpoint in the first entry of the log after it."""
        if resume_from_checkpoint:
            self.running_losses.saved = read_trainer_state(resume_from_checkpoint) or {}
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_losses(self) -> dict[str, Any]:
        """Return the losses that the next entry of the log is the mean of, and those looked at."""
        since_log = self.state.global_step - self._globalstep_last_logged
        return {
            "since_log": [self._tr_loss.item(), since_log],
            "first": self._first_loss,
            "risen": self._risen_in_a_row,
        }

    def _load_losses(self, saved: dict[str, Any]) -> None:
        total, steps = saved["since_log"]
        self._tr_loss += total
        self._globalstep_last_logged = self.state.global_step - steps
        self._first_loss, self._risen_in_a_row = saved["first"], saved["risen"]

    def skipped_steps(self) -> int:
        """Return how many steps had no finite loss, those before a checkpoint included."""
        return self.optimizer.skipped_steps

    def skipped_in_a_row(self) -> int:
        """Return how many of the last steps in a row had no finite loss."""
        return self.optimizer.param_groups[0]["skipped_in_a_row"]

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
        recorded = self.recording.step(self.state.global_step)
        if recorded is not None and recorded.smoothing is not None:
            smooth = recorded.smoothing
        for group in self.optimizer.param_groups:
            group["hessian_smooth"] = smooth

        weight = torch.tensor(self.batch_weight(inputs), device=self.args.device)
        weight_of_all = self._sum_of_parts(weight)
        inputs.pop(NOTHING, None)

        if self.settings.directions == "example":
            losses, part = losses_by_example(self.objective), weight / weight_of_all
            gathered = GatheredLosses(inputs, part, self.exchange, self.optimizer.directions)
        else:
            losses, gathered = self.compute_loss, None

        def batch_loss() -> Tensor:
            with self.compute_loss_context_manager():
                loss = losses(self.model, inputs)
            if gathered:
                return gathered(loss)
            if self.settings.parallel == "weights":
                return self.exchange.of_first(loss)
            return self._sum_of_parts(loss * weight) / weight_of_all

        is_told = self.optimizer.shares is not None
        taken = self.recording.watched(batch_loss, float(weight_of_all), is_told)

        def counted_loss() -> Any:
            # Those that the journal has were passes of the run, too.
            self.costs.forward_passes += 1
            return taken()

        loss = self.optimizer.estimate(counted_loss, float(weight_of_all))
        loss = torch.tensor(loss, device=self.args.device) * weight_of_all / num_items_in_batch
        self._loss_of_step += loss
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if parts_of(self.model) and not self.args.should_save:
            # The first process, which saves it, gathers the others' parts.
            self.optimizer.state_dict()
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not parts_of(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # No device has room for the whole h.
        for part, file in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            path = Path(checkpoint) / file
            part.load_state_dict(torch.load(path, "cpu", mmap=True, weights_only=True))

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: Any = None
    ) -> nn.Module:
        # Without gradients there is nothing for DistributedDataParallel to exchange, and it would
        # reserve memory for them, or give all processes the first one's parts of weights.
        # Accelerate, which wraps models too, leaves those alone that have this.
        model._is_accelerate_prepared = True
        return model

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Write the step into the journal, just before the update; no gradient has no norm."""
        self.recording.end_step(self.optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the optimizer's scalars beside the training loss."""
        if "loss" in logs:
            logs["projected_gradient"] = self.optimizer.projected_gradient
            logs["curvature"] = self.optimizer.curvature
            logs["hessian_mean"], logs["hessian_max"] = self.optimizer.hessian_mean_and_max()
            if self.settings.step_size == "curvature":
                logs["eta"] = self.optimizer.learning_rate(self.optimizer.param_groups[0])
            if self.args.world_size > 1:
                sent, steps = self._logged
                self._logged = self.exchange.bytes, self.state.global_step
                logs["exchanged_bytes_per_step"] = (self.exchange.bytes - sent) / max(
                    1, self.state.global_step - steps
                )
            if self.settings.clip is not None:
                logs["clipped_steps"] = self.optimizer.param_groups[0]["clipped_steps"]
        super().log(logs, start_time)
