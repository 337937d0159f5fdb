"""What a run will take, before it begins: steps, forward passes, memory and time.

Nothing is loaded but the configuration, the tokenizer and the examples.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from command_line.applicability import has_effect
from command_line.arguments import Arguments
from command_line.settings import changed_settings, examples_of_a_batch
from command_line.trainer_checks import steps_of_run
from command_line.values import AUTO
from experiment.preparation import Prepared, prepare
from hizoo import RARELY
from language_model.adapters import add_lora
from language_model.loading import choose_dtype, load_config_and_tokenizer
from task_data.sampling import ExampleSet
from tasks import Sample
from trainer import SmoothingSchedule

# Forward passes that a probe takes at most (step_sizes.find_step_sizes, by its defaults).
PROBE_PASSES = 197
# Samples whose lengths stand for those of all.
LOOKED_AT = 64
# What a backward pass costs, in forward passes.
BACKWARD = 2
# Operations of a layer, and the seconds that starting one takes; nanoseconds that HiZOO's shifts
# and its update take for a number of one direction (docs/speed-and-precision.md).
OPERATIONS, START = 15, {"cpu": 2e-5, "cuda": 8e-6}
STEP_NANOSECONDS = {"cpu": 4.0, "cuda": 0.02}
# Seconds in which a multiplication of matrices is timed.
TIMED = 0.1


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        steps: of training; 0: nothing is trained in steps.
        forward_passes: of training, one for each batch and process; those of a probe are in it.
        backward_passes: of training.
        evaluation_passes: forward passes of dev losses and metrics, of one batch each.
        parameters: of the model.
        trained_parameters: of them, or of an adapter.
        memory: bytes of weights, of what the optimizer keeps, and of a batch, at the peak.
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
        if self.steps:
            backward = f" and {self.backward_passes:,} backward" if self.backward_passes else ""
            yield (
                f"{self.steps:,} steps: {self.forward_passes:,} forward{backward} passes of "
                f"training, {self.evaluation_passes:,} of evaluation"
            )
        else:
            yield f"{self.evaluation_passes:,} forward passes of evaluation"
        trained = f", {self.trained_parameters:,} of them trained" if self.steps else ""
        if self.trained_parameters > self.parameters:
            trained = f", {self.trained_parameters:,} trained"
        yield f"{self.parameters:,} parameters{trained}; about {shown_bytes(self.memory)} of memory"
        yield f"about {shown_time(self.seconds)} on this machine"


def tell(arguments: Arguments) -> None:
    """Print what ``--show_config`` or ``--dry_run`` ask for.

    Raises:
        InputError: the model, the data or a number does not fit.
    """
    if arguments.show_config:
        lines = config_lines(arguments)
    else:
        lines = make_plan(arguments, prepare(arguments)).lines()
    if arguments.process_index == 0:
        print("\n".join(lines))


def config_lines(arguments: Arguments) -> Iterator[str]:
    """Yield the arguments as a file of ``--config``, and the other settings as comments.

    What a script has chosen and has no effect is left out.
    """
    settings = changed_settings(arguments)
    given = {
        name: settings.pop(name)
        for name in list(settings)
        if name in arguments.given
        and name not in ("config", "show_config", "dry_run")
        and (name in arguments.given_by_user or has_effect(arguments, name))
    }
    for name, value in given.items():
        if value is not None:
            yield f"{name}: {yaml_value(value)}"
    yield "# defaults"
    for name, value in settings.items():
        if value is not None and name not in arguments.given and has_effect(arguments, name):
            yield f"# {name}: {yaml_value(value)}"


def yaml_value(value: Any) -> str:
    """Return a value as it stands in YAML, in one line."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.17g}" if float(f"{value:g}") != value else f"{value:g}"
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n...\n").removesuffix("\n")


def shown_bytes(number: float) -> str:
    """Return bytes as MiB or GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def shown_time(seconds: float) -> str:
    """Return a duration in the largest unit of which there is more than one."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{max(1, round(seconds))} s"


def training_passes(arguments: Arguments) -> tuple[int, int]:
    """Return the forward and the backward passes of training, as the optimizer will count them.

    One for each batch of a process; a probe counts with the most that it takes.
    """
    if arguments.trainer == "none" or arguments.linear_probing:
        return 0, 0
    batches = batches_of_steps(arguments)
    steps = len(batches)
    if arguments.trainer == "regular":
        return sum(batches), sum(batches)
    directions = arguments.zo_num_samples
    grows = SmoothingSchedule.parse(arguments.hessian_smooth_type).value > 0
    own_scale = arguments.curvature_eps not in (None, arguments.zo_eps)
    measured: list[int] = []
    if grows or arguments.learning_rate == AUTO:
        every = arguments.curvature_every or (1 if grows and not own_scale else RARELY)
        # Each of the first steps measures c, and then every so many-th.
        measured = [n for step, n in enumerate(batches) if step < every or step % every == 0]
    of_c = 1 + (2 * directions if own_scale else 0)
    probes = 0
    if arguments.probed:
        again = arguments.probe_every
        probes = 1 + (len(range(again, steps, again)) if again else 0)
    # The first loss is taken twice.
    passes = 2 * directions * sum(batches) + of_c * sum(measured) + 1
    return passes + probes * PROBE_PASSES, 0


def batches_of_steps(arguments: Arguments) -> list[int]:
    """Return how many batches each step has; the last step of an epoch may have fewer."""
    size = examples_of_a_batch(arguments)
    of_epoch = max(1, math.ceil(arguments.num_train / size))
    if arguments.dataloader_drop_last:
        of_epoch = max(1, arguments.num_train // size)
    at_once = arguments.gradient_accumulation_steps
    epoch = [min(at_once, of_epoch - first) for first in range(0, of_epoch, at_once)]
    steps = steps_of_run(arguments)
    return (epoch * math.ceil(steps / len(epoch)))[:steps]


def make_plan(arguments: Arguments, prepared: Prepared) -> Plan:
    """Return what a run of these arguments will take.

    Raises:
        InputError: there is no such model.
    """
    config, _ = load_config_and_tokenizer(arguments.model_name, arguments.trust_remote_code)
    dtype = choose_dtype(arguments.load_float16, arguments.load_bfloat16)
    model = model_without_weights(config, dtype, arguments.trust_remote_code)
    parameters = sum(p.numel() for p in model.parameters())
    examples = prepared.example_sets[0]
    sets = len(prepared.example_sets)
    steps = 0
    forward, backward = training_passes(arguments)
    if forward:
        steps = steps_of_run(arguments)
    size = arguments.per_device_eval_batch_size
    evaluated = evaluated_samples(arguments, examples)
    generated = arguments.max_new_tokens if prepared.encoder.task.generation else 0
    per_batch = 1 + generated
    evaluations = math.ceil(evaluated / size) * per_batch
    train_tokens = arguments.per_device_train_batch_size * mean_tokens(prepared, examples.train)
    shown = examples.demonstrations[0] if examples.demonstrations else []
    eval_tokens = mean_tokens(prepared, examples.evaluation, shown)
    trained = trained_parameters(arguments, model, config) if arguments.trainer != "none" else 0
    of_a_pass = pass_seconds(arguments, model, config, dtype, train_tokens or eval_tokens)
    device = arguments.device.type
    of_steps = 0.0
    if arguments.trainer == "zo":
        of_steps = (
            steps * arguments.zo_num_samples * trained * STEP_NANOSECONDS.get(device, 0) * 1e-9
        )
    texts = evaluated * eval_tokens / max(1, train_tokens or eval_tokens)
    seconds = of_steps + of_a_pass * (forward + BACKWARD * backward + texts)
    if generated:
        seconds += evaluations * OPERATIONS * layers_of(config) * START.get(device, 0)
    batch = max(train_tokens, min(size, len(examples.evaluation)) * eval_tokens)
    return Plan(
        steps=steps * sets,
        forward_passes=forward * sets,
        backward_passes=backward * sets,
        evaluation_passes=evaluations * sets,
        parameters=parameters,
        trained_parameters=trained,
        memory=peak_memory(arguments, config, dtype, parameters, trained, batch),
        seconds=seconds * sets,
    )


def model_without_weights(
    config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Return a model whose weights take no memory."""
    with torch.device("meta"), _quiet():
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def evaluated_samples(arguments: Arguments, examples: ExampleSet) -> int:
    """Return how many samples are scored or generated in all, one of them several times."""
    number = 0 if arguments.no_eval else len(examples.evaluation) + len(examples.dev)
    if arguments.trainer == "none":
        return len(examples.evaluation)
    if arguments.eval_before_training:
        number += len(examples.evaluation)
    if arguments.linear_probing:
        return number + len(examples.train)
    if arguments.eval_strategy == IntervalStrategy.STEPS:
        every = arguments.eval_steps or arguments.logging_steps
        every = every if every >= 1 else every * steps_of_run(arguments)
        number += len(examples.dev) * int(steps_of_run(arguments) / every)
    elif arguments.eval_strategy == IntervalStrategy.EPOCH:
        number += len(examples.dev) * math.ceil(arguments.num_train_epochs)
    return number


def mean_tokens(
    prepared: Prepared, samples: Sequence[Sample], demonstrations: Sequence[Sample] = ()
) -> float:
    """Return the mean number of tokens of a sample: its prompt once, and all of its options."""
    encoder = prepared.encoder
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


def trained_parameters(
    arguments: Arguments, model: PreTrainedModel, config: PreTrainedConfig
) -> int:
    """Return how many numbers are trained; of a prefix those that it becomes."""
    head = model.get_output_embeddings()
    if arguments.linear_probing or arguments.head_tuning:
        return sum(parameter.numel() for parameter in head.parameters())
    if arguments.prefix_tuning:
        sizes = config.get_text_config()
        heads = sizes.num_attention_heads
        head_size = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
        of_keys = (getattr(sizes, "num_key_value_heads", None) or heads) * head_size
        return 2 * layers_of(config) * of_keys * arguments.num_prefix
    if arguments.lora:
        with torch.device("meta"):
            model = add_lora(model, arguments.lora_r, arguments.lora_alpha)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(p.numel() for p in model.parameters())


def layers_of(config: PreTrainedConfig) -> int:
    """Return how many layers a model has."""
    return getattr(config.get_text_config(), "num_hidden_layers", 0)


def peak_memory(
    arguments: Arguments,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    parameters: int,
    trained: int,
    tokens: float,
) -> int:
    """Return the bytes of weights, of what is kept for each trained number, and of a batch.

    A forward pass without gradients holds one layer's activations and the logits; with gradients
    each layer keeps 34 values of 16 bits for each token and hidden unit (arXiv 2205.05198, equation
    2, without the attention's square).
    """
    sizes = config.get_text_config()
    hidden = getattr(sizes, "hidden_size", 0)
    of_weight = {True: 1.0}.get(arguments.load_int8, dtype.itemsize)
    of_weight = 0.5 if arguments.load_int4 else of_weight
    kept = 0.0
    if arguments.trainer == "zo":
        full = arguments.hessian == "full"
        grows = SmoothingSchedule.parse(arguments.hessian_smooth_type).value > 0
        kept = dtype.itemsize if full and grows else 0
    elif arguments.trainer == "regular" and not arguments.linear_probing:
        # A gradient, and AdamW's two means.
        kept = 3 * dtype.itemsize
    layers = layers_of(config) if kept and arguments.trainer == "regular" else 1
    activations = 17 * dtype.itemsize * hidden * tokens * layers
    # In float32, and once more as probabilities. Those of scored tokens alone are computed.
    logits = 2 * 4 * sizes.vocab_size * min(tokens, 64 if layers == 1 else tokens)
    return int(parameters * of_weight + trained * kept + activations + logits)


def pass_seconds(
    arguments: Arguments,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    tokens: float,
) -> float:
    """Estimate the seconds of a forward pass of a batch with so many tokens.

    Its multiplications have the speed of one product of matrices, which is timed here; each
    operation takes a while to start.
    """
    sizes = config.get_text_config()
    hidden = getattr(sizes, "hidden_size", 256)
    embedded = model.get_input_embeddings().weight.numel()
    multiplied = sum(p.numel() for p in model.parameters()) - embedded
    rate = multiplications_a_second(arguments.device, dtype, max(1, int(tokens)), hidden)
    starts = OPERATIONS * layers_of(config) * START.get(arguments.device.type, 0)
    return multiplied * tokens / rate + starts


def multiplications_a_second(
    device: torch.device, dtype: torch.dtype, rows: int, size: int
) -> float:
    """Time the product of (rows, size) and (size, 4 size)."""
    rows = min(rows, 4096)
    left = torch.ones(rows, size, device=device, dtype=dtype)
    right = torch.ones(size, 4 * size, device=device, dtype=dtype)

    def finish(product: torch.Tensor) -> None:
        product[0, 0].item()

    finish(left @ right)
    count, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < TIMED:
        finish(left @ right)
        count += 1
    return count * rows * size * 4 * size / seconds
