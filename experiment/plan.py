"""What a run will take, before it begins: steps, forward passes, memory and time (``--dry_run``).

Nothing is loaded but the configuration, the tokenizer and the examples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from experiment.options import DataOptions, Options, TrainedWeights, TrainingOptions
from experiment.preparation import Prepared, choose_trained_weights
from hizoo import RARELY
from language_model.encoding import Encoder
from language_model.loading import load_config_and_tokenizer
from task_data.sampling import ExampleSet
from tasks import Sample
from zeroth_order.config import AUTO

# Samples whose lengths stand for those of all.
LOOKED_AT = 64
# What a backward pass costs, in forward passes.
BACKWARD = 2
# Seconds in which a multiplication of matrices is timed.
TIMED = 0.1


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        steps: of training; 0: nothing is trained in steps.
        forward_passes: of training, one for each batch and process; without a probe's.
        backward_passes: of training.
        evaluation_passes: forward passes of dev losses and metrics, of one batch each.
        parameters: of the model.
        trained_parameters: of them, or of an adapter.
        memory: bytes of the weights, and of what the optimizer keeps for those that are trained.
        seconds: an estimate for this machine, without loading.
    """

    steps: int
    forward_passes: int
    backward_passes: int
    evaluation_passes: int
    parameters: int
    trained_parameters: int
    memory: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """Yield the plan in words."""
        passes = f"{self.evaluation_passes:,} forward passes of evaluation"
        if self.steps:
            backward = f" and {self.backward_passes:,} backward" if self.backward_passes else ""
            passes = (
                f"{self.steps:,} steps: {self.forward_passes:,} forward{backward} passes of "
                f"training, {self.evaluation_passes:,} of evaluation"
            )
        yield passes
        trained = f", {self.trained_parameters:,} trained" if self.steps else ""
        yield (
            f"{self.parameters:,} parameters{trained}; {shown_bytes(self.memory)} for weights"
            f"{' and optimizer' if self.steps else ''}"
        )
        yield f"about {shown_time(self.seconds)} on this machine"


def shown_bytes(number: float) -> str:
    """Return bytes as MiB or GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def shown_time(seconds: float) -> str:
    """Return a duration in the largest unit of which there is more than one."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{max(1, round(seconds))} s"


def make_plan(options: Options, prepared: Prepared) -> Plan:
    """Return what a run of these options will take.

    Raises:
        InputError: there is no such model.
    """
    name, code = options.model.name, options.model.trust_remote_code
    config, _ = load_config_and_tokenizer(name, code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=options.model.dtype, trust_remote_code=code
        )
    parameters = sum(p.numel() for p in model.parameters())
    in_steps = options.training if options.weights.mode != "linear_probing" else None
    examples, sets = prepared.example_sets[0], len(prepared.example_sets)
    forward, backward = training_passes(in_steps, options.data) if in_steps else (0, 0)
    evaluated = _evaluated_samples(options, examples)
    task, generation = prepared.encoder.task, prepared.generation
    of_a_batch = 1 + (generation.max_new_tokens if task.generation else 0)
    tokenizer = prepared.encoder.tokenizer
    trained = _trained_parameters(model, options.weights, tokenizer) if in_steps else 0
    # Tokens that go through the model in all, a backward pass counting as two forward ones.
    shown = examples.demonstrations[0] if examples.demonstrations else []
    tokens = evaluated * mean_tokens(prepared.encoder, examples.evaluation, shown)
    if in_steps:
        batch = in_steps.own.per_device_train_batch_size
        of_batch = batch * mean_tokens(prepared.encoder, examples.train)
        tokens += (forward + BACKWARD * backward) * of_batch
    return Plan(
        steps=sets * in_steps.steps if in_steps else 0,
        forward_passes=sets * forward,
        backward_passes=sets * backward,
        evaluation_passes=sets * math.ceil(evaluated / options.evaluation.batch_size) * of_a_batch,
        parameters=parameters,
        trained_parameters=trained,
        memory=_memory(options, parameters, trained),
        seconds=sets * tokens * _seconds_of_a_token(options, model),
    )


def training_passes(training: TrainingOptions, data: DataOptions) -> tuple[int, int]:
    """Return the forward and the backward passes of training, as the optimizer will count them."""
    batches = _batches_of_steps(training, data.draw.num_train)
    if training.zeroth_order is None:
        return sum(batches), sum(batches)
    settings = training.zeroth_order.config
    directions = settings.num_samples
    grows = settings.hessian_smooth > 0
    own_scale = settings.curvature_eps not in (None, settings.eps)
    of_c = 1 + (2 * directions if own_scale else 0)
    measured = 0
    if grows or settings.lr == AUTO:
        every = settings.curvature_every or (1 if grows and not own_scale else RARELY)
        # Each of the first steps measures c, and then every so many-th.
        measured = sum(n for step, n in enumerate(batches) if step < every or step % every == 0)
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
    evaluation, training = options.evaluation, options.training
    if training is None:
        return len(examples.evaluation)
    number = len(examples.evaluation) * evaluation.eval_before_training
    number += (len(examples.evaluation) + len(examples.dev)) * (not evaluation.no_eval)
    if options.weights.mode == "linear_probing":
        return number + len(examples.train)
    own = training.own
    if own.eval_strategy == IntervalStrategy.STEPS:
        every = own.eval_steps or own.logging_steps
        number += len(examples.dev) * int(
            training.steps / (every if every >= 1 else every * training.steps)
        )
    elif own.eval_strategy == IntervalStrategy.EPOCH:
        number += len(examples.dev) * math.ceil(own.num_train_epochs)
    return number


def _trained_parameters(
    model: PreTrainedModel, weights: TrainedWeights, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Return how many numbers are trained."""
    weights = replace(weights, prefix_init_by_real_act=False)  # that takes a forward pass
    with torch.device("meta"):
        model = choose_trained_weights(model, weights, tokenizer)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _memory(options: Options, parameters: int, trained: int) -> int:
    """Return the bytes of weights, and of h or of a gradient and AdamW's two means."""
    training, size = options.training, options.model.dtype.itemsize
    weights = parameters * (options.model.bits / 8 if options.model.bits else size)
    if not trained:
        return int(weights)
    if training.zeroth_order is None:
        return int(weights) + 3 * size * trained
    settings = training.zeroth_order.config
    dtype = settings.hessian_dtype and getattr(torch, settings.hessian_dtype)
    has_h = settings.hessian == "full" and settings.hessian_smooth > 0
    return int(weights) + trained * (dtype.itemsize if dtype else size) * has_h


def mean_tokens(
    encoder: Encoder, samples: Sequence[Sample], demonstrations: Sequence[Sample] = ()
) -> float:
    """Return the mean number of tokens of a sample: its prompt once, and all of its options."""
    counts = []
    for sample in samples[:LOOKED_AT]:
        if encoder.task.generation:
            prompt = len(encoder.prompt(sample, demonstrations))
            counts.append(prompt + encoder.max_new_tokens)
            continue
        options = encoder.options(sample, demonstrations).options
        shared = max(len(option.tokens) - option.scored for option in options)
        counts.append(shared + sum(option.scored for option in options))
    return sum(counts) / len(counts) if counts else 0.0


def _seconds_of_a_token(options: Options, model: PreTrainedModel) -> float:
    """Estimate the seconds of a token in a forward pass, from one product of matrices timed here.

    The zeroth-order step itself, and whatever is no multiplication of matrices, is left out.
    """
    embedded = model.get_input_embeddings().weight.numel()
    multiplied = sum(p.numel() for p in model.parameters()) - embedded
    size = model.get_input_embeddings().weight.shape[-1]
    like = {"device": options.model.device, "dtype": options.model.dtype}
    left, right = torch.ones(512, size, **like), torch.ones(size, 4 * size, **like)
    (left @ right)[0, 0].item()
    count, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < TIMED:
        (left @ right)[0, 0].item()  # waits for a GPU
        count += 1
    return multiplied * seconds / (count * left.numel() * 4 * size)
