"""HiZOO, MeZO and error broadcast in transformers.Trainer: a step takes forward passes only."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput

from error_broadcast import ErrorBroadcast
from forward_only import ForwardOnlyMixin
from hizoo import HiZOO
from language_model.objectives import NegativeTextMetric
from language_model.streaming import read_hessians, save_hessians
from training.checkpoints import ANOTHER
from training.objective_trainer import ObjectiveTrainer
from training.optimizers import choose_layers, groups_of, make_optimizer
from training.processes import BORROWED, own_part, rows_of_all, see_every_batch
from training.recording import Recording
from utils import InputError
from zeroth_order import noise, step_rule
from zeroth_order.block_file import NoRoom
from zeroth_order.blocks import blocks_of
from zeroth_order.config import AUTO, HiZOOConfig
from zeroth_order.residual_stream import UnknownStream


class ForwardTrainer(ForwardOnlyMixin, ObjectiveTrainer):
    """Trains by forward passes, without a backward pass through the model.

    Under ``torchrun`` the processes share each batch, which is that of one process, and make the
    same update, so their weights stay equal without being exchanged.
    """

    @property
    def examples_of_a_batch(self) -> int:
        """The examples of a batch in all processes together."""
        return self._train_batch_size * self.args.world_size

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's parts of the batches of one process."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        collate, size = self.data_collator, self._train_batch_size
        self.data_collator = functools.partial(own_part, collate)
        self._train_batch_size = self.examples_of_a_batch
        try:
            return see_every_batch(super().get_train_dataloader())
        finally:
            self.data_collator, self._train_batch_size = collate, size

    def batch_weight(self, batch: dict[str, Any]) -> int:
        """Return what the loss of a batch is the mean over; 0 where another process has it."""
        return 0 if BORROWED in batch else super().batch_weight(batch)

    def loss_of(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch in the run's precision."""
        with self.compute_loss_context_manager():
            return self.compute_loss(self.model, inputs)

    def counted(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Let forward passes count; those whose losses come from a journal were of this run."""

        def loss() -> Any:
            self.costs.forward_passes += 1
            return closure()

        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward passes of one batch; the Trainer then calls ``optimizer.step()``."""
        self._begin_step()
        loss = super().training_step(*args, **kwargs)
        self._loss_of_step += loss
        return loss

    def _wrap_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        # accelerate does not wrap models with this attribute, in autocast either: --fp16 and --bf16
        # are for gradients.
        model._is_accelerate_prepared = True
        return model


class ZerothOrderTrainer(ForwardTrainer):
    """Trains by HiZOO, or by MeZO where the smoothing is 0.

    Every process runs its part of the batch, and they exchange losses. All of them make the same
    noise.

    Args:
        config: of the optimizer. Its learning rate, weight decay and seed count, not those of
            ``args``.
        perturbation: "inplace", "layerwise" (one module at a time, weights keep every bit) or
            "auto": layerwise where weights are half precision.
        recording: of the run's journal; None: no journal.
        **kwargs: of ``ObjectiveTrainer``.

    Raises:
        InputError: several processes would stream the weights and generate texts.
    """

    repeats_steps = False

    def __init__(
        self,
        *,
        config: HiZOOConfig,
        perturbation: str = "auto",
        recording: Recording | None = None,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.perturbation = perturbation
        self.recording = recording or Recording()
        self.layerwise: bool | None = None  # what ``perturbation`` comes to be
        self._batches: list[tuple[dict[str, Any], int, Tensor]] = []  # of the step under way
        super().__init__(**kwargs)
        generates = isinstance(self.objective, NegativeTextMetric)
        if generates and blocks_of(self.model) and self.args.world_size > 1:
            # Streamed passes end in the order of their texts' lengths; processes have other texts.
            raise InputError(
                "--offload: the losses of generated texts need all weights in memory, or one "
                f"process, and there are {self.args.world_size}; leave it out, or start one"
            )
        # The Trainer makes them as training begins, and asks callbacks for their state before.
        self._tr_loss, self._globalstep_last_logged = torch.zeros(()), 0
        self.args.learning_rate = step_rule.CURVATURE_PART if config.lr == AUTO else config.lr

    def create_optimizer(self, model: nn.Module | None = None) -> HiZOO:
        """Create the optimizer; biases and layer norms do not decay.

        Raises:
            InputError: μ or the perturbation does not fit the model.
        """
        if self.optimizer is None:
            layers = choose_layers(
                self.model.eval(), self.perturbation, self._loss_of_first_examples
            )
            decaying = self.get_decay_parameter_names(self.model)
            self.groups = groups_of(self.model, decaying, self.config.weight_decay)
            self.optimizer = make_optimizer(
                self.model, self.groups, self.config, layers, f"--zo_eps {self.config.eps:g}"
            )
        return self.optimizer

    def _loss_of_first_examples(self) -> Tensor:
        """Return the loss of the first examples, unshuffled; the same in every process."""
        examples = itertools.islice(self.train_dataset, self.args.per_device_train_batch_size)
        return self.loss_of(self._prepare_inputs(self.collate(list(examples))))

    def estimate(self, model: nn.Module, inputs: dict[str, Any], items: Tensor) -> float:
        """Keep a batch; run the passes of all of a step's batches at the last, or take its losses.

        So streamed weights are read once a step. The batches before it return 0, and the last one
        what makes up for them.
        """
        weight = self.batch_weight(inputs)
        inputs.pop(BORROWED, None)
        self._batches.append((inputs, weight, items))
        if not self.accelerator.sync_gradients:
            return 0.0
        batches, self._batches = self._batches, []

        def batch_loss(inputs: dict[str, Any], weight: int, items: Tensor) -> Tensor:
            return self.accelerator.reduce(self.loss_of(inputs) * weight, "sum") / items

        counts = [float(items) for *_, items in batches]
        closures = [functools.partial(batch_loss, *batch) for batch in batches]
        step = [*zip(closures, counts, strict=True)]
        step = self.recording.of_batches(self.state.global_step, step)
        step = [(self.counted(closure), count) for closure, count in step]
        with naming_way_out():
            losses = self.optimizer.estimate_batches(step)
        before = sum(loss * count for loss, count in zip(losses[:-1], counts, strict=False))
        return losses[-1] + before / counts[-1]

    def _get_grad_norm(self, *_: Any, **__: Any) -> None:
        """Write the step into the journal, just before the update; no gradient has no norm."""
        self.recording.write_step(self.optimizer)

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
            value = self.loss_of(self._prepare_inputs(inputs))
            return self.accelerator.reduce(value, "mean")

        direction += self.config.num_samples
        with naming_way_out():
            return self.optimizer.loss_along(self.counted(loss), distance, direction)

    def _run_state(self) -> dict[str, Any]:
        since_log = self.state.global_step - self._globalstep_last_logged
        return super()._run_state() | {
            "since_log": [self._tr_loss.item(), since_log],
            "noise": noise.VERSION,
            "optimizer": dataclasses.asdict(self.config),
            "layerwise": self.layerwise,
        }

    def _begin(self, saved: dict[str, Any] | None) -> None:
        """Begin; the first log entry includes the losses before a checkpoint."""
        super()._begin(saved)
        if saved:
            if saved["noise"] != noise.VERSION:
                raise InputError(f"{self._resumed_from} has another version's noise; {ANOTHER}")
            total, steps = saved["since_log"]
            self._tr_loss += math.nan if total is None else total  # JSON has no NaN
            self._globalstep_last_logged = self.state.global_step - steps
        if self.optimizer is None:  # of a finished run
            self.layerwise = saved.get("layerwise")
        else:
            self.layerwise = self.optimizer.layers is not None
            self.recording.begin(self.model, self.optimizer, self.groups, self.state)

    def _end_step(self) -> None:
        """Compare or write a checksum of the weights, too."""
        super()._end_step()
        self.recording.end_step(self.model, self.state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_hessians(self.model, self.optimizer, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            read_hessians(self.model, self.optimizer, Path(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.recording.file:
            self.recording.file.sync()

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train; the journal is whole and closed whatever happens."""
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self.recording.file:
                self.recording.file.close()

    def was_skipped(self) -> bool:
        """Whether the last step had no finite loss."""
        return self.optimizer.param_groups[0]["skipped_in_a_row"] > 0


class ErrorBroadcastTrainer(ForwardTrainer):
    """Trains by error broadcast, one forward pass a batch.

    Processes exchange the inputs and errors of their scored tokens.

    Args:
        method: arguments of ``ErrorBroadcast`` beside the model and the seed.
        **kwargs: of ``ObjectiveTrainer``.

    Raises:
        InputError: the model is of another architecture.
    """

    def __init__(self, *, method: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with naming_way_out():
            self.optimizer = ErrorBroadcast(self.model.eval(), seed=self.args.seed, **method)
        self.optimizer.gather = functools.partial(rows_of_all, device=self.args.device)
        group = self.optimizer.param_groups[0]
        self.args.learning_rate = group["lr"]
        # Other weights are frozen.
        self.model.requires_grad_(False)
        for parameter in group["params"]:
            parameter.requires_grad_(True)

    def estimate(self, model: nn.Module, inputs: dict[str, Any], items: Tensor) -> float:
        """Run the forward pass of one batch."""
        weight = self.batch_weight(inputs)
        inputs.pop(BORROWED, None)
        reads = (inputs["read_rows"], inputs["read_columns"])
        closure = self.counted(functools.partial(self.loss_of, inputs))
        with naming_way_out():
            loss = self.optimizer.estimate(closure, weight, reads)
        total = self.accelerator.reduce(torch.tensor(loss * weight, device=self.args.device), "sum")
        return float(total / items)

    def was_skipped(self) -> bool:
        """Whether the last step had no finite error."""
        return self.optimizer.was_skipped

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with κ under its own name."""
        if "learning_rate" in logs:
            logs["broadcast_rate"] = logs.pop("learning_rate")
        super().log(logs, start_time)


@contextlib.contextmanager
def naming_way_out() -> Iterator[None]:
    """Let a model that error broadcast does not know, or a full disk, end the run in one line."""
    try:
        yield
    except UnknownStream as error:
        raise InputError(f"--trainer broadcast: {error}; use --trainer zo") from error
    except NoRoom as error:
        raise InputError(f"--offload disk: {error}; give another --offload_dir") from error
