"""A model's weights in safetensors files: their names there, read and written one at a time."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    revert_weight_conversion,
)
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from utils import InputError
from zeroth_order.block_file import bytes_of, transfer

NAME_OF_DTYPE = {dtype: name for name, dtype in str_to_torch_dtype.items()}
# Files of a model, in the order in which transformers looks for them.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


# -------------------------------------------------------------------------------------------- names


def tied_weights(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that are the same tensor as another weight."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def saved_names(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's tensors, without values, under the names that ``save_pretrained`` gives.

    Those that are tied to another one are left out. transformers loads some families under other
    names than their files have (GPT-NeoX's head), or in other pieces (Mixtral's experts).
    """
    tied = tied_weights(model)
    without_values = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied
    }
    return revert_weight_conversion(model, without_values)


def check_weights(
    name: str,
    model: PreTrainedModel,
    missing: Collection[str],
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]],
) -> None:
    """Raise ``InputError`` if files lack weights of a model, or have other shapes (there, here)."""
    if mismatched:
        weight, there, here = min(mismatched)
        raise InputError(
            f"--model_name {name}: {weight} is {tuple(there)} in its files and {tuple(here)} by "
            "its configuration; give a whole model"
        )
    if missing:
        raise InputError(
            f"--model_name {name}: its files lack weights of {type(model).__name__}, as "
            f"{min(missing)} ({len(missing)} in all); give a model that was saved whole, with its "
            "language-model head"
        )


# ------------------------------------------------------------------------------------------ reading


class OpenFile:
    """A file to read; it is closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file."""

    file: OpenFile
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, target: Tensor) -> int:
        """Read the tensor into ``target``, of any dtype; return how many bytes it has."""
        is_same = target.dtype == self.dtype
        whole = target if is_same else torch.empty(self.shape, dtype=self.dtype)
        if whole.nbytes:
            transfer(os.preadv, self.file.descriptor, bytes_of(whole), self.start)
        if not is_same:
            target.copy_(whole)
        return whole.nbytes


def places_in(path: Path) -> dict[str, Place]:
    """Return where the tensors of a safetensors file lie; these keep it open.

    Its tensors are read by their places, since safetensors maps the whole file: what was read would
    stay in this process's memory.

    Raises:
        SafetensorError: it is no such file, it is cut off, or it has numbers of another kind.
    """
    file, end = OpenFile(path), path.stat().st_size
    places = {}
    with safe_open(path, "pt") as header:
        # Tensors lie one behind the other, up to the end.
        for name in reversed(header.offset_keys()):
            entry = header.get_slice(name)
            dtype, shape = str_to_torch_dtype.get(entry.get_dtype()), tuple(entry.get_shape())
            if dtype is None:
                raise SafetensorError(f"{path}: {name} is {entry.get_dtype()}")
            end -= math.prod(shape) * dtype.itemsize
            places[name] = Place(file, end, dtype, shape)
    return places


@dataclass(frozen=True)
class Merged:
    """A tensor that lies in several pieces, as the experts of a layer do."""

    converter: WeightConverter  # makes it of them, as transformers does where it loads a model
    pieces: dict[str, list[Place]]  # by the patterns of the converter that their names match

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return tuple(self._of(lambda place: torch.empty(place.shape, device="meta")).shape)

    def read(self, target: Tensor) -> int:
        """Read the tensor into ``target``, of any dtype; return how many bytes its pieces have."""
        sizes = []

        def read(place: Place) -> Tensor:
            piece = torch.empty(place.shape, dtype=target.dtype)
            sizes.append(place.read(piece))
            return piece

        target.copy_(self._of(read))
        return sum(sizes)

    def _of(self, read: Callable[[Place], Tensor]) -> Tensor:
        tensors: Any = {pattern: [*map(read, each)] for pattern, each in self.pieces.items()}
        patterns = (self.converter.source_patterns, self.converter.target_patterns)
        for operation in self.converter.operations:
            tensors = operation.convert(tensors, *patterns)
        (whole,) = tensors.values()
        return whole


@dataclass(frozen=True)
class WeightFiles:
    """Tensors in safetensors files, by their names there or by those that a model gives them."""

    places: Mapping[str, Place | Merged]

    @classmethod
    def of_model(cls, folder: str | Path, model: PreTrainedModel) -> WeightFiles:
        """Return the weights of a model on disk, a Hub id or a folder, whole or in shards.

        Raises:
            InputError: there are none, or several weights are stored in one piece.
        """
        name = str(folder)

        def find(file: str) -> str | None:
            return cached_file(name, file, _raise_exceptions_for_missing_entries=False)

        if single := find(SINGLE):
            paths = [single]
        elif index := find(INDEX):
            paths, _ = get_checkpoint_shard_files(name, index)
        else:
            raise InputError(
                f"--model_name {name}: --offload reads safetensors files, and there are none; save "
                "the model as such, or leave --offload out"
            )
        stored: dict[str, Place] = {}
        for path in paths:
            stored |= places_in(Path(path))
        conversions = get_model_conversion_mapping(model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
        how = (renamings, converters, model.base_model_prefix, model.state_dict(keep_vars=True))
        places: dict[str, Place | Merged] = {}
        for key in sorted(stored, key=dot_natural_key):  # the order of transformers
            named, pattern = rename_source_key(key, *how)
            if pattern is None:
                places[named] = stored[key]
                continue
            converter = converter_of[pattern]
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

    def differ(self, first: str, second: str, dtype: torch.dtype) -> bool:
        """Tell whether the files hold both tensors, and they differ in a dtype."""
        if not {first, second} <= self.places.keys():
            return False
        tensors = [torch.empty(self.places[each].shape, dtype=dtype) for each in (first, second)]
        for name, tensor in zip((first, second), tensors, strict=True):
            self.read(name, tensor)
        return not torch.equal(*tensors)


# ------------------------------------------------------------------------------------------ writing


def write_weights(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, torch.Size]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a safetensors file; ``tensors`` come one by one, with their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in kinds.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        kind = {"dtype": NAME_OF_DTYPE[dtype], "shape": [*shape]}
        header[name] = kind | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            if tensor.numel():
                file.write(bytes_of(tensor.detach().cpu().contiguous()))
