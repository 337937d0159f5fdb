"""Models of transformers whose blocks are streamed from disk or from the host's memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from hizoo import HiZOO
from language_model.weight_files import (
    SINGLE,
    WeightFiles,
    check_weights,
    places_in,
    saved_names,
    tied_weights,
    write_weights,
)
from utils import InputError
from zeroth_order.block_file import give_freed_memory_back
from zeroth_order.blocks import Blocks, NoBlocks, blocks_of, placeholder
from zeroth_order.curvature import OFFSET

logger = logging.getLogger(__name__)

# The full h of streamed weights, in a checkpoint.
HESSIANS = "hessian.safetensors"


@dataclass(frozen=True)
class Offload:
    """Where blocks lie while they are not needed."""

    folder: Path | None  # of the working file; None: in the host's memory
    memory: int  # in bytes; the first blocks that fit stay there
    device: torch.device  # runs the passes
    write_every: int | None = 1  # of ``Blocks``


def load_streamed(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, offload: Offload, trusts: bool
) -> PreTrainedModel:
    """Load a model for evaluation, without the weights of its blocks.

    Raises:
        InputError: it has no blocks, or its files lack weights or hold quantised ones.
    """
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"--model_name {name}: its weights are quantised, and --offload reads only ordinary "
            "ones; leave it out"
        )
    give_freed_memory_back()
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusts)
    # As from_pretrained does: buffers, as rotary positions, are computed in float32.
    model.initialize_weights()
    with contextlib.suppress(OSError):  # there is none
        model.generation_config = GenerationConfig.from_pretrained(name)
    files = WeightFiles.of_model(name, model)
    _tie(name, model, files)
    _give_placeholders(model, _kept_in_float32(model, files, dtype), offload.device)
    found = names_in(model, files)
    missing = [each for each, weight in model.named_parameters() if weight not in found]
    shapes = [(each, files.places[each].shape, tuple(w.shape)) for w, each in found.items()]
    check_weights(name, model, missing, [each for each in shapes if each[1] != each[2]])
    stream_blocks(model, files, offload)
    _read_outside(model, files)
    model.save_pretrained = functools.partial(_save, model)
    return model.eval()


def stream_blocks(model: nn.Module, files: WeightFiles | None, offload: Offload) -> Blocks:
    """Let a model's blocks come from files; raise ``InputError`` if it names none."""
    source, staged = files and files.read, offload.device.type == "cuda"
    try:
        return Blocks(model, source, offload.folder, offload.memory, staged, offload.write_every)
    except NoBlocks as error:
        raise InputError(f"--offload: {error}; leave it out") from error


def _tie(name: str, model: PreTrainedModel, files: WeightFiles) -> None:
    """Tie weights, except those that differ in the files; transformers does the same."""
    for target, source in [*model.all_tied_weights_keys.items()]:
        if files.differ(target, source, model.dtype):
            del model.all_tied_weights_keys[target]
            logger.warning(
                f"--model_name {name}: its configuration ties {target} to {source}, but they "
                "differ in its files: they are not tied"
            )
    model.tie_weights(recompute_mapping=False)


def _kept_in_float32(
    model: PreTrainedModel, files: WeightFiles, dtype: torch.dtype
) -> Collection[Tensor]:
    """Return the tensors of files that stay in float32 in a model of another dtype."""
    patterns = [each.replace("*", ".*") for each in model._get_dtype_plan(dtype)]
    found = names_in(model, files).items()
    return {t for t, name in found if any(re.search(pattern, name) for pattern in patterns)}


def _give_placeholders(
    model: nn.Module, in_float32: Collection[Tensor], device: torch.device
) -> None:
    """Give a model parameters without memory on a device; shared ones stay shared."""

    def converted(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor in in_float32 else tensor

    made = {p: nn.Parameter(placeholder(converted(p), device)) for p in model.parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = made.get(parameter)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = converted(buffer).to(device)


def names_in(model: PreTrainedModel, files: WeightFiles) -> dict[Tensor, str]:
    """Return the names of parameters and buffers that files have, the first of each."""
    names: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in files.places:
            names.setdefault(tensor, name)
    return names


def _read_outside(model: PreTrainedModel, files: WeightFiles) -> None:
    """Read the weights that are not streamed."""
    blocks = blocks_of(model)
    for tensor, name in names_in(model, files).items():
        if tensor not in blocks.block_of:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            files.read(name, whole)
            tensor.data = whole.to(tensor.device)


def load_if_streamed_or_renamed(model: nn.Module, folder: Path) -> bool:
    """Load a checkpoint into a model that the Trainer cannot load; tell whether it is one.

    It resumes with ``load_state_dict``, which leaves out names that are not the model's own.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if blocks := blocks_of(model):
        files = WeightFiles.of_model(folder, model)
        _read_outside(model, files)
        blocks.begin_again(files.read)
        return True
    if saved_names(model).keys() <= {*model.state_dict()}:
        return False
    saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


def read_hessians(model: nn.Module, optimizer: HiZOO, folder: Path) -> None:
    """Read the h of blocks in a checkpoint, of a streamed model or of one in memory, for either."""
    path, blocks = folder / HESSIANS, blocks_of(model)
    saved = WeightFiles(places_in(path)) if path.is_file() else None
    if blocks:
        in_memory = {
            block.names[parameter]: optimizer.state.pop(parameter)[OFFSET]
            for parameter, block in blocks.block_of.items()
            if OFFSET in optimizer.state.get(parameter, {})
        }

        def copy(name: str, target: Tensor) -> int:
            target.copy_(in_memory[name])
            return 0

        if saved:
            blocks.hessians = saved.read
        else:
            blocks.hessians = copy if in_memory else None
    elif saved:
        for name, place in saved.places.items():
            offset = torch.empty(place.shape, dtype=place.dtype)
            place.read(offset)
            parameter = model.get_parameter(name)
            optimizer.state[parameter] = {OFFSET: offset.to(parameter.device)}


def save_hessians(model: nn.Module, optimizer: HiZOO, folder: Path) -> None:
    """Save the h of the blocks of a model, if it is streamed, one block in memory at a time."""
    blocks = blocks_of(model)
    kinds: dict[str, tuple[torch.dtype, torch.Size]] = {}
    parameters = []
    for block in blocks.blocks if blocks else ():
        for key, (_, shape, dtype) in block.region.places.items():
            if isinstance(key, tuple):  # a parameter's h, not the parameter
                kinds[block.names[key[0]]] = dtype, shape
                parameters.append(key[0])
    if kinds:
        hessians = (optimizer.state[p][OFFSET] for p in blocks.in_order(parameters))
        write_weights(folder / HESSIANS, kinds, zip(kinds, hessians, strict=True))


def _save(model: PreTrainedModel, save_directory: Path | str, **_: Any) -> None:
    """Save a streamed model as ``save_pretrained`` does, one block in memory at a time."""
    folder = Path(save_directory)
    PreTrainedModel.save_pretrained(model, folder, state_dict={})
    kinds = {name: (weight.dtype, weight.shape) for name, weight in saved_names(model).items()}
    own = model.state_dict(keep_vars=True)
    for name in tied_weights(model):
        own.pop(name, None)
    loaded = zip(own, blocks_of(model).in_order(own.values()), strict=True)
    # transformers stores some weights in other pieces than the model has.
    pieces = (revert_weight_conversion(model, {name: weight}).items() for name, weight in loaded)
    write_weights(folder / SINGLE, kinds, itertools.chain.from_iterable(pieces))
