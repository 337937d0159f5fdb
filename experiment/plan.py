"""What a run will take, before it begins: steps, forward passes and memory (``--dry_run``).

Nothing is loaded but the configuration, the tokenizer and the examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from command_line.arguments import Arguments, plain_value
from command_line.settings import optimizer_config, passes_of_a_batch
from error_broadcast import ErrorBroadcast
from experiment.options import Options
from experiment.preparation import Prepared, choose_trained_weights
from language_model.loading import load_config_and_tokenizer
from language_model.streaming import Offload, stream_blocks
from trainer import naming_way_out
from zeroth_order import step_rule
from zeroth_order.block_file import NoRoom, free_bytes
from zeroth_order.blocks import Blocks
from zeroth_order.traffic import BUFFERS, DISK, HOST


def mib(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 2**20:,.0f} MiB"


@dataclass(frozen=True)
class OffloadPlan:
    """Bytes that streamed weights take."""

    blocks: int  # how many there are
    largest: int  # block, with its h
    read: int  # by a step
    written: int | None  # by a step; None: a forward pass writes nothing
    on_disk: int  # the working file
    in_memory: int  # buffers, perturbed copies, and with their h blocks that stay and other weights

    def line(self) -> str:
        """Return the plan in words."""
        moved = f"a forward pass reads {mib(self.read)}"
        if self.written is not None:
            moved = f"a step reads {mib(self.read)} and writes {mib(self.written)}"
        disk = f", {mib(self.on_disk)} on disk" if self.on_disk else ""
        return (
            f"{self.blocks} blocks, the largest {mib(self.largest)}; {moved}; "
            f"{mib(self.in_memory)} in memory{disk}"
        )


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
        trained, kept = "", "weights"
        if self.steps:
            backward = f", {self.backward_passes:,} backward" if self.backward_passes else ""
            yield f"{self.steps:,} steps: {self.forward_passes:,} forward passes{backward}"
            trained, kept = f", {self.trained_parameters:,} trained", "weights and optimizer"
        yield f"{self.parameters:,} parameters{trained}; {mib(self.memory)} for {kept}"
        if self.offload:
            yield self.offload.line()


def make_plan(options: Options, prepared: Prepared) -> Plan:
    """Return what a run of these options will take."""
    model, arguments, (encoder, sets) = options.model, options.arguments, prepared
    config, _ = load_config_and_tokenizer(model.name, model.trust_remote_code)
    costs, trained = (0, 0, 0), []
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
        blocks = model.offload and stream_blocks(empty, None, model.offload)
        whole, parameters = empty, sum(p.numel() for p in empty.parameters())
        if arguments.has_steps:
            of_sets = [passes_of_training(arguments, len(each.train)) for each in sets]
            costs = [sum(numbers) for numbers in zip(*of_sets, strict=True)]
            # Real activations would take a forward pass.
            weights = replace(options.weights, prefix_init_by_real_act=False)
            whole = choose_trained_weights(empty, weights, encoder.tokenizer)
            trained = _trained(whole, arguments)
    kept, offload = kept_for_a_weight(arguments, model.dtype.itemsize), None
    if model.offload:
        states = {parameter: ("h", model.dtype) for parameter in trained if kept}
        offload = plan_of_offload(blocks, whole, model.offload, states, bool(trained))
    number = sum(p.numel() for p in trained)
    return Plan(
        *costs,
        parameters=parameters,
        trained_parameters=number,
        memory=parameters * model.dtype.itemsize + number * kept,
        offload=offload,
    )


def plan_of_offload(
    blocks: Blocks,
    model: nn.Module,
    offload: Offload,
    states: Mapping[Tensor, tuple[str, torch.dtype]],
    trains: bool,
) -> OffloadPlan:
    """Return what it takes to stream a model, which is on the meta device with its adapter.

    ``states`` are names and dtypes of the full h of parameters that have one.

    Raises:
        InputError: the disk has no room.
    """
    with torch.device("meta"):  # buffers take no memory
        blocks.lay_out(states)
    sizes = [block.region.size for block in blocks.blocks]
    home = DISK if offload.folder else HOST
    far = [block.region.size for block in blocks.blocks if block.home == home]
    writes = trains and any(p.requires_grad for p in blocks.block_of)
    resident = [p for p in model.parameters() if p not in blocks.block_of]
    memory = sum(sizes) - sum(far) + sum(p.nbytes for p in resident)
    memory += sum(p.numel() * states[p][1].itemsize for p in resident if p in states)
    memory += min(BUFFERS, len(far)) * max(far, default=0)
    if trains:  # perturbed copies of a whole block, and of one weight outside of blocks
        inside = {p for block in blocks.blocks for p in block.module.parameters()}
        outside = [p for p in model.parameters() if p not in inside]
        memory += max(_trained_bytes(block.module.parameters()) for block in blocks.blocks)
        memory += max((_trained_bytes([p]) for p in outside), default=0)
    on_disk = blocks.traffic.size_on_disk(blocks.blocks) if writes else 0
    if on_disk and free_bytes(offload.folder) < on_disk:
        with naming_way_out():
            raise NoRoom.of(offload.folder, on_disk)
    written = sum(far) * writes if trains else None
    return OffloadPlan(len(sizes), max(sizes), sum(far), written, on_disk, memory)


def _trained_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.nbytes for p in parameters if p.requires_grad)


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


def _trained(model: nn.Module, arguments: Arguments) -> list[nn.Parameter]:
    """Return the trained parameters, or raise InputError: error broadcast knows few models."""
    if arguments.trainer != "broadcast":
        return [p for p in model.parameters() if p.requires_grad]
    matrices = arguments.broadcast_matrices.split(",")
    with naming_way_out():
        optimizer = ErrorBroadcast(model, first=arguments.broadcast_from, matrices=matrices)
    return [p for group in optimizer.param_groups for p in group["params"]]


def passes_of_training(arguments: Arguments, examples: int) -> tuple[int, int, int]:
    """Return steps, forward and backward passes of training on so many examples."""
    at_once, steps = arguments.gradient_accumulation_steps, arguments.steps_of_run(examples)
    of_epoch = arguments.batches_of_an_epoch(examples)
    # The last step of an epoch may have fewer batches.
    epoch = [min(at_once, of_epoch - first) for first in range(0, of_epoch, at_once)]
    batches = (epoch * math.ceil(steps / len(epoch)))[:steps]
    if arguments.trainer == "broadcast":
        return steps, sum(batches), 0
    if arguments.trainer == "regular":
        return steps, sum(batches), sum(batches)
    of_g, every = passes_of_a_batch(optimizer_config(arguments))
    measured = sum(n for i, n in enumerate(batches) if every and step_rule.is_measured(i, every))
    # The first loss is taken twice.
    return steps, of_g * sum(batches) + measured + 1, 0
