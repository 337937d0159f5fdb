"""What a run will take, before it begins: steps, forward passes and memory (``--dry_run``).

Nothing is loaded but the configuration, the tokenizer and the examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from command_line.arguments import Arguments, plain_value
from command_line.settings import optimizer_config, passes_of_a_batch
from error_broadcast import ErrorBroadcast
from experiment.offload_plan import OffloadPlan, plan_of_offload
from experiment.options import Options
from experiment.preparation import Prepared, choose_trained_weights
from language_model.loading import load_config_and_tokenizer
from language_model.streaming import stream_blocks
from trainer import naming_way_out
from zeroth_order import step_rule


@dataclass(frozen=True)
class Plan:
    """What a run takes; ``memory`` is the bytes of its weights and of its optimizer's state."""

    steps: int
    forward_passes: int
    backward_passes: int
    parameters: int
    trained_parameters: int
    memory: int
    offload: OffloadPlan | None

    def lines(self) -> Iterator[str]:
        """Yield the plan in words."""
        memory = f"{self.memory / 2**20:,.0f} MiB for weights"
        if self.steps:
            backward = f", {self.backward_passes:,} backward" if self.backward_passes else ""
            yield f"{self.steps:,} steps: {self.forward_passes:,} forward passes{backward}"
            trained = f"{self.trained_parameters:,} trained"
            yield f"{self.parameters:,} parameters, {trained}; {memory} and optimizer"
        else:
            yield f"{self.parameters:,} parameters; {memory}"
        if self.offload:
            yield self.offload.line()


def make_plan(options: Options, prepared: Prepared) -> Plan:
    """Return what a run of these options will take."""
    model, arguments, encoder = options.model, options.arguments, prepared.encoder
    config, _ = load_config_and_tokenizer(model.name, model.trust_remote_code)
    steps = forward = backward = trained = 0
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
        blocks = model.offload and stream_blocks(empty, None, model.offload)
        whole, parameters = empty, sum(p.numel() for p in empty.parameters())
        if options.trains and options.weights.mode != "linear_probing":
            steps, (forward, backward) = arguments.steps_of_run, training_passes(arguments)
            # Real activations would take a forward pass.
            weights = replace(options.weights, prefix_init_by_real_act=False)
            whole = choose_trained_weights(empty, weights, encoder.tokenizer)
            trained = sum(p.numel() for p in _trained(whole, arguments))
    of_all_sets = (number * len(prepared.example_sets) for number in (steps, forward, backward))
    size, offload = model.dtype.itemsize, None
    kept = kept_for_a_weight(arguments, size)
    if model.offload:
        of_trained = _trained(whole, arguments) if trained and kept else ()
        states = {parameter: ("h", model.dtype) for parameter in of_trained}
        offload = plan_of_offload(blocks, whole, model.offload, states, bool(trained))
    memory = parameters * size + trained * kept
    return Plan(*of_all_sets, parameters, trained, memory, offload)


def kept_for_a_weight(arguments: Arguments, size: int) -> int:
    """Return the bytes that training keeps for each trained weight, of ``size`` bytes, beside it.

    What is kept for a matrix's rows and columns alone (HiZOO-L, Adafactor) is not counted.
    """
    if arguments.trainer == "regular":
        kept = {"adalomo": 0, "lomo": 0, "sgd": 1, "adafactor": 1}  # gradients
        return size * kept.get(plain_value(arguments.optim), 3)  # with AdamW's two means
    if arguments.trainer == "zo":
        zo = optimizer_config(arguments)
        if zo.hessian == "full" and zo.hessian_smooth > 0:
            return size
    return 0  # a step of MeZO or error broadcast keeps nothing


def _trained(model: nn.Module, arguments: Arguments) -> Iterator[nn.Parameter]:
    """Yield the trained parameters.

    Raises:
        InputError: error broadcast does not know the architecture.
    """
    if arguments.trainer != "broadcast":
        yield from (p for p in model.parameters() if p.requires_grad)
        return
    matrices = arguments.broadcast_matrices.split(",")
    with naming_way_out():
        optimizer = ErrorBroadcast(model, first=arguments.broadcast_from, matrices=matrices)
    for group in optimizer.param_groups:
        yield from group["params"]


def training_passes(arguments: Arguments) -> tuple[int, int]:
    """Return the forward and the backward passes of training, as the optimizer will count them."""
    at_once, steps = arguments.gradient_accumulation_steps, arguments.steps_of_run
    of_epoch = arguments.batches_of_an_epoch
    # The last step of an epoch may have fewer batches.
    epoch = [min(at_once, of_epoch - first) for first in range(0, of_epoch, at_once)]
    batches = (epoch * math.ceil(steps / len(epoch)))[:steps]
    if arguments.trainer == "broadcast":
        return sum(batches), 0
    if arguments.trainer == "regular":
        return sum(batches), sum(batches)
    of_g, every = passes_of_a_batch(optimizer_config(arguments))
    measured = 0
    if every:
        measured = sum(n for step, n in enumerate(batches) if step_rule.is_measured(step, every))
    # The first loss is taken twice.
    return of_g * sum(batches) + measured + 1, 0
