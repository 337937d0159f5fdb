"""Weights in files, read one at a time by their places, and written one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
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

    Raises:
        SafetensorError: it is no such file, or it is cut off.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size, length = (
        os.fstat(descriptor).st_size,
        int.from_bytes(os.pread(descriptor, 8, 0), "little"),
    )
    if not 0 < length <= size - 8:
        raise SafetensorError(f"{path} has no header")
    header = json.loads(os.pread(descriptor, length, 8))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise SafetensorError(f"{path} is cut off")
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise SafetensorError(f"{path}: {name} is {entry['dtype']}")
        places[name] = Place(descriptor, 8 + length + start, dtype, tuple(entry["shape"]))
    return places


class WeightFiles:
    """The tensors of some safetensors files, by the names that a model gives them."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = places

    @classmethod
    def of_file(cls, path: Path) -> WeightFiles:
        """Return the tensors of a file by their names there."""
        return cls(places_in(path))

    @classmethod
    def of_model(cls, name: str | Path, model: PreTrainedModel) -> WeightFiles:
        """Return the weights of a model on disk, a Hub id or a folder, whole or in shards.

        Raises:
            InputError: there are none, or they are stored in other pieces than the model has.
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
        state, places = model.state_dict(keep_vars=True), {}
        for path in paths:
            for key, place in places_in(Path(path)).items():
                prefix = model.base_model_prefix
                named, converted = rename_source_key(key, renamings, converters, prefix, state)
                if converted is not None:
                    raise InputError(
                        f"--offload: {name} stores {key} in other pieces than "
                        f"{type(model).__name__} has; leave --offload out"
                    )
                places[named] = place
        return cls(places)

    def read(self, name: str, target: Tensor) -> int:
        """Read a tensor into ``target``, in any dtype; return how many bytes it has."""
        return self.places[name].read(target)


def write_weights(
    path: Path, kinds: Mapping[str, tuple[torch.dtype, torch.Size]], tensors: Iterable[Tensor]
) -> None:
    """Write a safetensors file; ``tensors`` come one by one, in the order of ``kinds``."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in kinds.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            if tensor.numel():
                file.write(bytes_of(tensor.detach().cpu().contiguous()))
