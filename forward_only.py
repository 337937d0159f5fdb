"""Steps without a backward pass in any ``transformers.Trainer``, TRL's among them.

    class ForwardOnlySFT(ForwardOnlyMixin, SFTTrainer):
        pass

    method = HiZOO, {"lr": 1e-6, "hessian_smooth": 1e-8}
    ForwardOnlySFT(MODEL, args, train_dataset=rows, optimizer_cls_and_kwargs=method).train()

``(ErrorBroadcast, {"lr": 1.0})`` trains by error broadcast. Needs torch, and the trainer's package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from error_broadcast import ErrorBroadcast
from hizoo import HiZOO, Layers, OnlyInPlace
from zeroth_order.blocks import blocks_of


class ForwardOnlyMixin:
    """Lets a ``transformers.Trainer`` step by HiZOO, MeZO or error broadcast; name it first.

    The optimizer is the one given (``optimizers`` or ``optimizer_cls_and_kwargs``), otherwise HiZOO
    with the learning rate, the weight decay and the seed of ``args``. Half-precision weights are
    perturbed module by module, unless an optimizer was made already. Batches that are accumulated,
    or shared by processes, count as the Trainer counts them, by their labels if there are any.
    Schedules, logging, evaluation and checkpoints are the Trainer's.

    A step calls ``compute_loss`` for each forward pass, so metrics that a trainer collects there
    include perturbed weights. Below the model itself all modules are in evaluation mode: without
    dropout the losses of a step differ by the perturbation alone.

    Raises:
        ValueError: another optimizer was given, weights are sharded (FSDP, DeepSpeed), or error
            broadcast was asked for in several processes.
        OnlyInPlace: the loss reads half-precision weights outside their modules.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # DataParallel would cut a batch apart, and multiplies the batch size.
        self.args._n_gpu = min(1, self.args.n_gpu)
        self._train_batch_size = self.args.train_batch_size

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer if none was given."""
        model = model or self.model
        if self.optimizer is None:
            default = HiZOO, {"lr": self.args.learning_rate, "seed": self.args.seed}
            kind, settings = self.optimizer_cls_and_kwargs or default
            if issubclass(kind, ErrorBroadcast):
                settings = {"model": model.eval(), **settings}
            elif any(p.element_size() < 4 for p in model.parameters() if p.requires_grad):
                settings = {"layers": Layers(model), **settings}
            given, self.optimizer_cls_and_kwargs = self.optimizer_cls_and_kwargs, (kind, settings)
            super().create_optimizer(model)
            self.optimizer_cls_and_kwargs = given  # the next model has its own layers, and rate
        optimizer = self.optimizer
        name = type(optimizer).__name__
        if not isinstance(optimizer, HiZOO | ErrorBroadcast):
            raise ValueError(
                f"{name} needs gradients: give optimizer_cls_and_kwargs=(HiZOO, {{...}}), or leave "
                "ForwardOnlyMixin out"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"{name} needs whole weights: leave FSDP and DeepSpeed out")
        if self.args.world_size > 1 and isinstance(getattr(optimizer, "gather", None), nn.Identity):
            raise ValueError(f"{name} in several processes: train in one, or set its ``gather``")
        return optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run the forward passes of one batch; the Trainer then calls ``optimizer.step()``.

        Returns the batch's part of the step's loss.
        """
        model.eval()
        model.training = True  # by which trainers tell training from evaluation
        inputs = self._prepare_inputs(inputs)
        items = self._get_num_items_in_batch([inputs], self.args.device)
        loss = self.estimate(model, inputs, items)
        if items is None:
            part = 1 / self.current_gradient_accumulation_steps
        else:
            part = float(items / num_items_in_batch)
        return torch.tensor(loss * part, device=self.args.device)

    def estimate(self, model: nn.Module, inputs: dict[str, Any], items: Tensor | None) -> float:
        """Run the forward passes of one batch, whose loss is the mean over ``items``."""
        # A batch without labels counts 0; its loss must not be 0 / 0.
        divisor = None if items is None else items.clamp(min=1)

        def loss() -> Tensor:
            # A copy: some trainers take labels out.
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, dict(inputs), num_items_in_batch=divisor)
            return self.accelerator.reduce(value, "mean")

        # The same in all processes, which may have counted their own labels.
        weight = None if items is None else float(self.accelerator.reduce(items.double(), "mean"))
        try:
            return self.optimizer.estimate(loss, weight)
        except OnlyInPlace as error:
            raise OnlyInPlace(
                f"half-precision weights, and {error}: take a loss that runs the model whole (of "
                "TRL's SFTTrainer: compute_loss = Trainer.compute_loss), or float32 weights"
            ) from error

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Clip nothing: there is no gradient."""

    def _get_grad_norm(self, *_: Any, **__: Any) -> None:
        """Return nothing: no gradient has no norm."""

    def _wrap_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        """Return the model with autocast alone: DistributedDataParallel is for gradients."""
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _get_learning_rate(self) -> float:
        """Return η, for the log; where it is "auto" the scheduler knows k only."""
        if isinstance(self.optimizer, HiZOO):
            return self.optimizer.learning_rate(self.optimizer.param_groups[0])
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with HiZOO's scalars beside the training loss."""
        optimizer = self.optimizer
        if "loss" in logs and isinstance(optimizer, HiZOO):
            logs["projected_gradient"] = optimizer.projected_gradient
            if optimizer.wants_curvature:
                logs["curvature"] = optimizer.curvature
            # Of MeZO h is 1; that of streamed weights would have to be read.
            if optimizer.state and not blocks_of(self.model):
                logs["hessian_mean"], logs["hessian_max"] = optimizer.hessian_mean_and_max()
        super().log(logs, *args, **kwargs)
