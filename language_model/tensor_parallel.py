"""A model whose large weights lie in parts, some rows or columns, in several processes.

transformers says which weights are cut (its tensor-parallel plans), loads each process's parts and
runs the forward passes, in which processes add up what their parts give. From there on the parts
are ordinary parameters here, with their places in the wholes: what perturbs, checks or counts
weights sees plain tensors. What is saved is the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from hizoo import HiZOO, Shard
from utils import InputError

# How transformers cuts weights, as far as it is known here: all others are packed, or of experts.
KNOWN_STYLES = {
    *("colwise", "colwise_gather_output", "colwise_rep"),
    *("rowwise", "rowwise_split_input", "rowwise_rep"),
    *("embedding_rowwise", "embedding_colwise"),
    *("replicate", "replicated_with_grad_allreduce"),
}
# Plans of families that transformers has none for.
OWN_PLANS = {
    "opt": {
        "model.decoder.embed_tokens": "embedding_rowwise",
        "model.decoder.layers.*.self_attn.q_proj": "colwise",
        "model.decoder.layers.*.self_attn.k_proj": "colwise",
        "model.decoder.layers.*.self_attn.v_proj": "colwise",
        "model.decoder.layers.*.self_attn.out_proj": "rowwise",
        "model.decoder.layers.*.fc1": "colwise",
        "model.decoder.layers.*.fc2": "rowwise",
        "lm_head": "colwise_gather_output",
    }
}
# Their attention asks how many heads it has, where others see it from their weights.
COUNTS_HEADS = {"opt": "num_heads"}


class Parts:
    """Which parameters of a model are parts of larger ones: ``HiZOO.shards``.

    All processes have to call what exchanges something, with the same parameters in the same order.

    Attributes:
        places: of the parameters that are parts.
        mesh: of the processes, one-dimensional.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.places: dict[Tensor, Shard] = {}

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, number by number."""
        return self._reduced(tensor, torch.distributed.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Return the largest of the processes' numbers, each by itself."""
        return self._reduced(tensor, torch.distributed.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        there = tensor.to(self.mesh.device_type, copy=True)
        torch.distributed.all_reduce(there, operation, group=self.mesh.get_group())
        return there.to(tensor.device)

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape of a parameter, or of the one that it is a part of."""
        place = self.places.get(parameter)
        return place.shape if place else tuple(parameter.shape)

    def as_dtensor(self, parameter: Tensor, tensor: Tensor) -> DTensor:
        """Return a part of a whole as transformers has it; ``tensor`` is in the parameter's shape.

        It uses the same memory.
        """
        place = self.places[parameter]
        stride = torch.empty(place.shape, device="meta").stride()
        cut = [Cut(place.dimension)]
        return DTensor.from_local(
            tensor.detach(), self.mesh, cut, run_check=False, shape=place.shape, stride=stride
        )

    def gathered(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return the whole that all processes' tensors, in the shape of a parameter, are parts of.

        In the memory of the first process beside its device, in the others nothing of it: the
        tensor is empty there.
        """
        if parameter in self.places:
            tensor = self.as_dtensor(parameter, tensor).full_tensor()
        if self.mesh.get_local_rank() > 0:
            return tensor.new_empty(0)
        return tensor.detach().to("cpu").contiguous()

    def part_of(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """Return the part of a whole tensor that a parameter's place is, as a view."""
        place = self.places.get(parameter)
        if place is None:
            return whole
        return whole.narrow(place.dimension, place.start, parameter.shape[place.dimension])


def parts_of(model: nn.Module) -> Parts | None:
    """Return which parameters of a model are parts; None: this process has all of it."""
    return getattr(model, "tensor_parallel_parts", None)


def whole_shape(model: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, or of the one that it is a part of."""
    parts = parts_of(model)
    return parts.shape(parameter) if parts else tuple(parameter.shape)


# -------------------------------------------------------------------------------- how it is loaded


def settings_of_parts(
    name: str, config: PreTrainedConfig, processes: int, trust_remote_code: bool
) -> DistributedConfig:
    """Return what transformers is told to load a model in parts.

    Args:
        name: of the model, for messages.
        config: its configuration.
        processes: how many parts.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: nobody knows how to cut this family, or its heads do not divide.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    shown = f"--tensor_parallel: {type(model).__name__} ({name})"
    alone = "leave it out: one process spreads the layers over its GPUs"
    own = OWN_PLANS.get(config.model_type)
    plan = own or model.tp_plan
    # A plan for the head alone leaves the layers whole.
    if not any("*" in name for name in plan):
        raise InputError(f"{shown} has no plan in transformers how it is cut; {alone}")
    unknown = sorted(set(plan.values()) - KNOWN_STYLES)
    if unknown:
        raise InputError(f"{shown} is cut in a way that is not known here ({unknown[0]}); {alone}")
    sizes = config.get_text_config(decoder=True)
    for attribute in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(sizes, attribute, None)
        if heads and any(each % processes for each in (heads if type(heads) is list else [heads])):
            raise InputError(
                f"{shown}: {processes} processes cannot share its {heads} heads "
                f"({attribute}) evenly; start as many processes as divide them"
            )
    return DistributedConfig(tp_size=processes, tp_plan=own or "auto")


def keep_parts(name: str, model: PreTrainedModel) -> None:
    """Make ordinary parameters of the parts that transformers has loaded; note their places.

    Raises:
        InputError: a weight is cut in a way that is not known, or a process would have nothing.
    """
    mesh = model._mesh_manager.get_mesh("tp")
    parts = model.tensor_parallel_parts = Parts(mesh)
    known: dict[Tensor, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        own = {n: p for n, p in module._parameters.items() if isinstance(p, DTensor)}
        for leaf, cut in own.items():
            # Tied weights stay one.
            if cut not in known:
                part = nn.Parameter(cut.to_local().contiguous(), cut.requires_grad)
                place = place_of(f"{path}.{leaf}", name, cut, part)
                if place:
                    parts.places[part] = place
                known[cut] = part
            module._parameters[leaf] = known[cut]
        if own and not isinstance(module, nn.Linear):
            # Without gradients transformers runs linear layers on plain tensors, and no others.
            module.forward = on_dtensors(module, parts)
    counts = COUNTS_HEADS.get(model.config.model_type)
    for module in model.modules():
        if counts and hasattr(module, counts):
            setattr(module, counts, getattr(module, counts) // mesh.size())
    # transformers would gather, save and train DTensors only.
    model.config.distributed_config = None
    model._device_mesh = model._mesh_manager = model._tp_size = None
    model._is_distributed_loading_by_transformers = False


def place_of(weight: str, name: str, whole: DTensor, part: Tensor) -> Shard | None:
    """Return where a process's part of a weight lies; None: all processes have all of it.

    Raises:
        InputError: it is no range of rows or columns, or there are too many processes for one.
    """
    (placement,) = whole.placements
    if isinstance(placement, Replicate):
        return None
    shown = f"--tensor_parallel: {weight} of {name}"
    if type(placement) is not Cut or placement.dim % whole.dim() > 1:
        raise InputError(f"{shown} is packed ({placement}): parts of it cannot be trained")
    dimension = placement.dim % whole.dim()
    length = math.ceil(whole.shape[dimension] / whole.device_mesh.size())
    start = length * whole.device_mesh.get_local_rank()
    # The same in all processes: the last one has the least.
    last = whole.shape[dimension] - length * (whole.device_mesh.size() - 1)
    if last <= 0:
        raise InputError(
            f"{shown} is {tuple(whole.shape)}, too small for {whole.device_mesh.size()} "
            "processes; start fewer"
        )
    if part.shape[dimension] != min(length, whole.shape[dimension] - start):
        raise InputError(f"{shown} is cut in another way than in equal parts")
    return Shard(tuple(whole.shape), dimension, start)


def on_dtensors(module: nn.Module, parts: Parts) -> Callable[..., Any]:
    """Return a module's forward, as transformers has made it, on parts that are plain tensors."""
    forward = module.forward

    def run(*arguments: Any, **named: Any) -> Any:
        own = {n: p for n, p in module._parameters.items() if p in parts.places}
        module._parameters.update({n: parts.as_dtensor(p, p) for n, p in own.items()})
        try:
            return forward(*arguments, **named)
        finally:
            module._parameters.update(own)

    return run


# ------------------------------------------------------------------------- wholes on the disk


def whole_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the whole model's tensors in the first process, None in the others; all have to call.

    Tied weights are one tensor.
    """
    parts = parts_of(model)
    known: dict[Tensor, Tensor] = {}
    wholes = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in known:
            known[tensor] = parts.gathered(tensor, tensor)
        wholes[name] = known[tensor]
    return wholes if parts.mesh.get_local_rank() == 0 else None


@torch.no_grad()
def load_parts(model: nn.Module, files: list[Path]) -> None:
    """Give a model its parts of the whole tensors in safetensors files, by their names."""
    parts, own = parts_of(model), model.state_dict(keep_vars=True)
    for file in files:
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118 - safe_open is no mapping
                place = parts.places.get(own[name])
                whole = saved.get_slice(name)
                if place is None:
                    own[name].data.copy_(whole[...])
                    continue
                length = own[name].shape[place.dimension]
                chosen = slice(place.start, place.start + length)
                cut = whole[chosen] if place.dimension == 0 else whole[:, chosen]
                own[name].data.copy_(cut)


class HiZOOOfParts(HiZOO):
    """``HiZOO`` whose state, where it is saved, is that of the whole parameters.

    All processes have to call ``state_dict``; that of the first one is whole.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the whole h."""
        saved = super().state_dict()
        saved["state"] = {
            number: {
                name: self.shards.gathered(parameter, tensor)
                if tensor.shape == parameter.shape
                else tensor
                for name, tensor in saved["state"][number].items()
            }
            for number, parameter in self._numbered(saved)
            if number in saved["state"]
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a whole state, of which the parts of h are kept."""
        state = {
            number: {
                name: self.shards.part_of(parameter, tensor).contiguous()
                if tensor.shape == self.shards.shape(parameter)
                else tensor
                for name, tensor in state_dict["state"][number].items()
            }
            for number, parameter in self._numbered(state_dict)
            if number in state_dict["state"]
        }
        super().load_state_dict({**state_dict, "state": state})

    def _numbered(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        return zip(numbers, self._parameters(), strict=True)
