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

from experiment.options import DataOptions, ModelOptions, Options, TrainedWeights, TrainingOptions
from experiment.preparation import Prepared, choose_trained_weights
from language_model.encoding import Encoder
from language_model.loading import load_config_and_tokenizer
from task_data.sampling import ExampleSet
from tasks import Sample
from zeroth_order import step_rule
from zeroth_order.config import AUTO

# Samples whose lengths stand for those of all.
LOOKED_AT = 64
# What a backward pass takes, in forward passes, and a zeroth-order step, in its own.
BACKWARD, STEP = 2, 1.3
# Seconds in which a multiplication of matrices is timed.
TIMED = 0.1


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        forward_passes: of training, one for each batch and process; without a probe's.
        evaluation_passes: of dev losses and metrics, one for each batch.
        memory: bytes of the weights and of the optimizer's state.
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
        yield f"about {shown_time(self.seconds)} on this machine"


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
    model = _model_without_weights(options.model)
    parameters = sum(p.numel() for p in model.parameters())
    training = options.training if options.weights.mode != "linear_probing" else None
    examples, encoder = prepared.example_sets[0], prepared.encoder
    forward = backward = trained = 0
    evaluated = _evaluated_samples(options, examples)
    shown = examples.demonstrations[0] if examples.demonstrations else []
    tokens = evaluated * mean_tokens(encoder, examples.evaluation, shown)
    if training:
        forward, backward = training_passes(training, options.data)
        trained = _trained_parameters(model, options.weights, encoder.tokenizer)
        batch = training.own.per_device_train_batch_size * mean_tokens(encoder, examples.train)
        tokens += (forward + BACKWARD * backward if backward else STEP * forward) * batch
    batches = math.ceil(evaluated / options.evaluation.batch_size)
    sets = len(prepared.example_sets)
    return Plan(
        steps=sets * training.steps if training else 0,
        forward_passes=sets * forward,
        backward_passes=sets * backward,
        evaluation_passes=sets * batches * (1 + encoder.max_new_tokens * encoder.task.generation),
        parameters=parameters,
        trained_parameters=trained,
        memory=_memory(options, parameters, trained),
        seconds=sets * tokens * _seconds_of_a_token(options.model, model),
    )


def _model_without_weights(options: ModelOptions) -> PreTrainedModel:
    code = options.trust_remote_code
    config, _ = load_config_and_tokenizer(options.name, code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=options.dtype, trust_remote_code=code)


def training_passes(training: TrainingOptions, data: DataOptions) -> tuple[int, int]:
    """Return the forward and the backward passes of training, as the optimizer will count them."""
    batches = _batches_of_steps(training, data.draw.num_train)
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
    evaluation, training = options.evaluation, options.training
    if training is None:
        return len(examples.evaluation)
    number = len(examples.evaluation) * evaluation.eval_before_training
    number += (len(examples.evaluation) + len(examples.dev)) * (not evaluation.no_eval)
    if options.weights.mode == "linear_probing":
        return number + len(examples.train)
    own, times = training.own, 0
    if own.eval_strategy == IntervalStrategy.STEPS:
        every = own.eval_steps or own.logging_steps
        times = int(training.steps / every if every >= 1 else 1 / every)
    elif own.eval_strategy == IntervalStrategy.EPOCH:
        times = math.ceil(own.num_train_epochs)
    return number + times * len(examples.dev)


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
    size, bits = options.model.dtype.itemsize, options.model.bits
    kept = 3 * size
    if trained and options.training.zeroth_order:
        config = options.training.zeroth_order.config
        kept = getattr(torch, config.hessian_dtype).itemsize if config.hessian_dtype else size
        kept *= config.hessian == "full" and config.hessian_smooth > 0
    return int(parameters * (bits / 8 if bits else size)) + trained * kept


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


def _seconds_of_a_token(options: ModelOptions, model: PreTrainedModel) -> float:
    """Estimate the seconds of a token in a forward pass, from one product of matrices timed here.

    Whatever is no multiplication of matrices is left out.
    """
    embeddings = model.get_input_embeddings().weight
    multiplied = sum(p.numel() for p in model.parameters()) - embeddings.numel()
    size = embeddings.shape[-1]
    left = torch.ones(512, size, device=options.device, dtype=options.dtype)
    right = left.new_ones(size, 4 * size)
    count, started = -1, 0.0  # the first product is not timed
    while count < 1 or time.perf_counter() - started < TIMED:
        (left @ right)[0, 0].item()  # waits for a GPU
        count += 1
        started = started if count else time.perf_counter()
    return multiplied * (time.perf_counter() - started) / (count * left.numel() * 4 * size)
