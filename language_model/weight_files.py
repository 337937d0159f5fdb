"""Weights in files, read one at a time by their places, and written one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from utils import InputError
from zeroth_order.block_file import bytes_of, transfer

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Files of a model, in the order in which transformers looks for them.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file."""

    descriptor: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, target: Tensor) -> int:
        """Read the tensor into ``target``, of any dtype; return how many bytes it has."""
        whole = target
        if target.dtype != self.dtype:
            whole = torch.empty(self.shape, dtype=self.dtype)
        if whole.nbytes:
            transfer(os.preadv, self.descriptor, bytes_of(whole), self.start)
        if whole is not target:
            target.copy_(whole)
        return whole.nbytes


def places_in(path: Path) -> dict[str, Place]:
    """Return where the tensors of a safetensors file lie; the file stays open.

    Its tensors are read by their places, since safetensors maps the whole file: what was read would
    stay in this process's memory.

    Raises:
        SafetensorError: it is no such file, it is cut off, or it has numbers of another kind.
    """
    descriptor, end = os.open(path, os.O_RDONLY | os.O_CLOEXEC), path.stat().st_size
    places = {}
    with safe_open(path, "pt") as file:
        # Tensors lie one behind the other, up to the end.
        for name in reversed(file.offset_keys()):
            entry = file.get_slice(name)
            dtype, shape = DTYPES.get(entry.get_dtype()), tuple(entry.get_shape())
            if dtype is None:
                raise SafetensorError(f"{path}: {name} is {entry.get_dtype()}")
            end -= math.prod(shape) * dtype.itemsize
            places[name] = Place(descriptor, end, dtype, shape)
    return places


@dataclass(frozen=True)
class Merged:
    """A tensor that lies in several pieces, as the experts of a layer do.

    Attributes:
        converter: makes it of them, as transformers does where it loads a model.
        pieces: by the patterns of the converter that their names match.
    """

    converter: WeightConverter
    pieces: dict[str, list[Place]]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return tuple(self._of(lambda place: torch.empty(place.shape, device="meta")).shape)

    def read(self, target: Tensor) -> int:
        """Read the tensor into ``target``, of any dtype; return how many bytes its pieces have."""
        count = 0

        def read(place: Place) -> Tensor:
            nonlocal count
            piece = torch.empty(place.shape, dtype=target.dtype)
            count += place.read(piece)
            return piece

        target.copy_(self._of(read))
        return count

    def _of(self, read: Callable[[Place], Tensor]) -> Tensor:
        tensors: Any = {pattern: [*map(read, each)] for pattern, each in self.pieces.items()}
        patterns = (self.converter.source_patterns, self.converter.target_patterns)
        for operation in self.converter.operations:
            tensors = operation.convert(tensors, *patterns)
        (whole,) = tensors.values()
        return whole


class WeightFiles:
    """The tensors of some safetensors files, by the names that a model gives them."""

    def __init__(self, places: Mapping[str, Place | Merged]) -> None:
        self.places = places

    @classmethod
    def of_file(cls, path: Path) -> WeightFiles:
        """Return the tensors of a file by their names there."""
        return cls(places_in(path))

    @classmethod
    def of_model(cls, name: str | Path, model: PreTrainedModel) -> WeightFiles:
        """Return the weights of a model on disk, a Hub id or a folder, whole or in shards.

        Raises:
            InputError: there are none, or several weights are stored in one piece.
        """
        found = cached_file(str(name), SINGLE, _raise_exceptions_for_missing_entries=False)
        paths = [found] if found else []
        index = not found and cached_file(
            str(name), INDEX, _raise_exceptions_for_missing_entries=False
        )
        if index:
            paths, _ = get_checkpoint_shard_files(str(name), index)
        if not paths:
            raise InputError(
                f"--model_name {name}: --offload reads safetensors files, and there are none; save "
                "the model as such, or leave --offload out"
            )
        conversions = get_model_conversion_mapping(model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        pattern_of = {pattern: each for each in converters for pattern in each.source_patterns}
        state, places, stored = model.state_dict(keep_vars=True), dict[str, Place | Merged](), {}
        for path in paths:
            stored |= places_in(Path(path))
        for key in sorted(stored, key=dot_natural_key):  # the order of transformers
            prefix = model.base_model_prefix
            named, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if pattern is None:
                places[named] = stored[key]
                continue
            converter = pattern_of[pattern]
            if len(converter.target_patterns) > 1:
                raise InputError(
                    f"--offload: {name} stores {key} in one piece with other weights of "
                    f"{type(model).__name__}; leave --offload out"
                )
            merged = places.setdefault(named, Merged(converter, {}))
            merged.pieces.setdefault(pattern, []).append(stored[key])
        return cls(places)

    def read(self, name: str, target: Tensor) -> int:
        """Read a tensor into ``target``, in any dtype; return how many bytes it has."""
        return self.places[name].read(target)


def write_weights(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, torch.Size]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a safetensors file; ``tensors`` come one by one, with their names."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, (dtype, shape) in kinds.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [starts[name], end]
        header[name] = {"dtype": NAMES[dtype], "shape": [*shape], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + starts[name])
            if tensor.numel():
                file.write(bytes_of(tensor.detach().cpu().contiguous()))
