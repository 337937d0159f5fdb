"""What a run will take, before it begins: steps, forward passes and memory (``--dry_run``).

Nothing is loaded but the configuration, the tokenizer and the examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import IntervalStrategy

from experiment.options import DataOptions, Options, TrainingOptions
from experiment.preparation import Prepared, choose_trained_weights
from language_model.loading import load_config_and_tokenizer
from task_data.sampling import ExampleSet
from zeroth_order import step_rule
from zeroth_order.config import AUTO


@dataclass(frozen=True)
class Plan:
    """What a run takes; ``memory`` is the bytes of its weights and of its optimizer's state."""

    steps: int
    forward_passes: int
    backward_passes: int
    evaluation_passes: int
    parameters: int
    trained_parameters: int
    memory: int

    def lines(self) -> Iterator[str]:
        """Yield the plan in words."""
        passes = f"{self.evaluation_passes:,} forward passes of evaluation"
        trained, kept = "", "weights"
        if self.steps:
            backward = f" and {self.backward_passes:,} backward" if self.backward_passes else ""
            passes = (
                f"{self.steps:,} steps: {self.forward_passes:,} forward{backward} passes of "
                f"training, {self.evaluation_passes:,} of evaluation"
            )
            trained, kept = f", {self.trained_parameters:,} trained", "weights and optimizer"
        yield passes
        memory = f"{self.memory / 2**20:,.0f} MiB for {kept}"
        yield f"{self.parameters:,} parameters{trained}; {memory}"


def make_plan(options: Options, prepared: Prepared) -> Plan:
    """Return what a run of these options will take.

    Raises:
        InputError: there is no such model.
    """
    model, tokenizer = options.model, prepared.encoder.tokenizer
    config, _ = load_config_and_tokenizer(model.name, model.trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
        parameters = sum(p.numel() for p in empty.parameters())
        steps = forward = backward = trained = 0
        if options.training and options.weights.mode != "linear_probing":
            steps = options.training.steps
            forward, backward = training_passes(options.training, options.data)
            # Real activations would take a forward pass.
            weights = replace(options.weights, prefix_init_by_real_act=False)
            with_trained = choose_trained_weights(empty, weights, tokenizer)
            trained = sum(p.numel() for p in with_trained.parameters() if p.requires_grad)
    samples = _evaluated_samples(options, prepared.example_sets[0])
    evaluated = math.ceil(samples / options.eval_batch_size)
    if prepared.encoder.task.generation:
        evaluated *= 1 + prepared.encoder.max_new_tokens
    sets = len(prepared.example_sets)
    return Plan(
        *(sets * steps, sets * forward, sets * backward, sets * evaluated),
        *(parameters, trained, _memory(options, parameters, trained)),
    )


def training_passes(training: TrainingOptions, data: DataOptions) -> tuple[int, int]:
    """Return the forward and the backward passes of training, as the optimizer will count them."""
    batches = _batches_of_steps(training, data.num_train)
    if training.zeroth_order is None:
        return sum(batches), sum(batches)
    config = training.zeroth_order.config
    grows, directions = config.hessian_smooth > 0, config.num_samples
    own_scale = config.curvature_eps not in (None, config.eps)
    of_c = 1 + 2 * directions * own_scale
    measured = 0
    if grows or config.lr == AUTO:
        every = config.curvature_every or (1 if grows and not own_scale else step_rule.RARELY)
        # Each of the first steps measures c, and then every so many-th.
        measured = sum(n for step, n in enumerate(batches) if step_rule.is_measured(step, every))
    # The first loss is taken twice.
    return 2 * directions * sum(batches) + of_c * measured + 1, 0


def _batches_of_steps(training: TrainingOptions, num_train: int) -> list[int]:
    """Return how many batches each step has; the last step of an epoch may have fewer."""
    size, at_once = training.examples_of_a_batch, training.own.gradient_accumulation_steps
    whole = math.floor if training.own.dataloader_drop_last else math.ceil
    of_epoch = max(1, whole(num_train / size))
    epoch = [min(at_once, of_epoch - first) for first in range(0, of_epoch, at_once)]
    return (epoch * math.ceil(training.steps / len(epoch)))[: training.steps]


def _evaluated_samples(options: Options, examples: ExampleSet) -> int:
    """Return how many samples are scored or generated in all, one of them several times."""
    training = options.training
    if training is None:
        return len(examples.evaluation)
    number = len(examples.evaluation) * options.eval_before_training
    number += (len(examples.evaluation) + len(examples.dev)) * (not options.no_eval)
    if options.weights.mode == "linear_probing":
        return number + len(examples.train)
    own, times = training.own, 0
    if own.eval_strategy == IntervalStrategy.STEPS:
        every = own.eval_steps or own.logging_steps
        times = int(training.steps / every if every >= 1 else 1 / every)
    elif own.eval_strategy == IntervalStrategy.EPOCH:
        times = math.ceil(own.num_train_epochs)
    return number + times * len(examples.dev)


def _memory(options: Options, parameters: int, trained: int) -> int:
    """Return the bytes of weights, and of h or of a gradient and AdamW's two means."""
    size, bits = options.model.dtype.itemsize, options.model.bits
    kept = 3 * size
    if trained and options.training.zeroth_order:
        config = options.training.zeroth_order.config
        kept = getattr(torch, config.hessian_dtype).itemsize if config.hessian_dtype else size
        kept *= config.hessian == "full" and config.hessian_smooth > 0
    return int(parameters * (bits / 8 if bits else size)) + trained * kept
