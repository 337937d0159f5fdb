"""HiZOO: a Hessian-informed zeroth-order optimizer that needs forward passes only.

One file, torch only: copy it into your project.

    optimizer = HiZOO(model.parameters(), lr=1e-6, eps=1e-3, hessian_smooth=1e-8)
    for batch in batches:
        loss = optimizer.step(lambda: model(**batch).loss)

When to use it: fine-tuning a model whose gradients or Adam states do not fit in memory, or whose
objective has no gradient. When not: training from scratch. A step sees one random direction, so it
needs many more steps than backpropagation, and a start that is already good (a pre-trained model and
a prompt that says what is asked).

Sources: HiZOO, Zhao et al., ICLR 2025 (arXiv 2402.15173); MeZO, which is HiZOO with
``hessian_smooth=0``, Malladi et al., NeurIPS 2023 (arXiv 2305.17333); the factorised curvature of
HiZOO-L after Adafactor, Shazeer and Stern, 2018 (arXiv 1804.04235).

One step, for parameters θ, diagonal curvature h (starts at 1), learning rate η, perturbation scale μ,
smoothing α, weight decay λ, and u ~ N(0, I) drawn from the step's seed:

    l0 = L(θ)     l+ = L(θ + μ u/√h)     l- = L(θ - μ u/√h)
    g  = (l+ - l-) / 2μ                   projected gradient, a scalar
    c  = |l+ + l- - 2 l0| / 2μ²           curvature along u/√h, a scalar
    h  <- (1-α) h + α c h u²              elementwise
    θ  <- θ - η (g u/√h + λ θ)            with the new h

The noise u is never stored. It is a function of (seed, step, parameter, tile) and is drawn again, tile
by tile, whenever it is needed: three times a step, once for each shift and once for the update, which
also takes the last shift back. No global random state is read or changed.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A tile is what is drawn, scaled and added at once. On a CPU core it has to stay in the cache; on
# another device it has to be large enough that launching its kernels costs little.
CPU_TILE_ELEMENTS = 1 << 16
DEVICE_TILE_ELEMENTS = 1 << 22
# Neighbouring tiles go to a worker together, so that handing them out costs little.
PACKET_ELEMENTS = 1 << 20
MAX_WORKERS = 32
MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1


def mix_seed(*numbers: int) -> int:
    """Hash whole numbers into one 64-bit seed (splitmix64's finaliser, folded over ``numbers``)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
        state ^= state >> 31
    return state


def tile_seed(stream: int, tile: int) -> int:
    """Seed of one tile of a 64-bit noise ``stream``.

    torch's CPU generator uses the lower 32 bits of a seed only. They are a bijection of the tile's
    number, so that no two tiles of a step ever share their noise.
    """
    low = (stream + tile) & MASK_32
    low = ((low ^ (low >> 16)) * 0x85EBCA6B) & MASK_32
    low = ((low ^ (low >> 13)) * 0xC2B2AE35) & MASK_32
    return (stream & ~MASK_32 & MASK_64) | (low ^ (low >> 16))


@dataclass(frozen=True)
class TileGrid:
    """How a parameter, seen as a matrix of ``rows`` x ``columns``, is cut into contiguous tiles.

    A tile is some whole rows, or a part of one row where a row alone is larger than a tile.
    """

    rows: int
    columns: int
    tile_elements: int

    @property
    def rows_per_tile(self) -> int:
        return max(1, self.tile_elements // max(1, self.columns))

    @property
    def tiles_per_row(self) -> int:
        return max(1, math.ceil(self.columns / self.tile_elements))

    def __len__(self) -> int:
        return math.ceil(self.rows / self.rows_per_tile) * self.tiles_per_row

    def __getitem__(self, tile: int) -> tuple[slice, slice]:
        """Rows and columns of a tile."""
        block, part = divmod(tile, self.tiles_per_row)
        first_row = block * self.rows_per_tile
        rows = slice(first_row, min(self.rows, first_row + self.rows_per_tile))
        if self.tiles_per_row == 1:
            return rows, slice(0, self.columns)
        first_column = part * self.tile_elements
        return rows, slice(first_column, min(self.columns, first_column + self.tile_elements))


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter's place in the optimizer: its group, its tiles, and the number of its first tile."""

    parameter: Tensor
    group: dict[str, Any]
    grid: TileGrid
    first_tile: int

    def matrix(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the parameter's shape, as the matrix that the grid cuts; no copy."""
        return tensor.detach().view(self.grid.rows, self.grid.columns)


Packet = list[tuple[Slot, range]]


def cut_into_packets(slots: Sequence[Slot]) -> list[Packet]:
    """Cut the tiles of ``slots`` into packets of about ``PACKET_ELEMENTS`` numbers, in order."""
    packets: list[Packet] = [[]]
    room = PACKET_ELEMENTS
    for slot in slots:
        if not slot.parameter.numel():
            continue
        per_tile = min(slot.grid.tile_elements, slot.grid.rows_per_tile * slot.grid.columns)
        first = 0
        while first < len(slot.grid):
            if room <= 0:
                packets.append([])
                room = PACKET_ELEMENTS
            last = min(len(slot.grid), first + max(1, room // per_tile))
            packets[-1].append((slot, range(first, last)))
            room -= (last - first) * per_tile
            first = last
    return [packet for packet in packets if packet]


class Scratch(threading.local):
    """Buffers and generators of the calling thread, made once and used for every tile."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self.generators: dict[torch.device, torch.Generator] = {}

    def buffer(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of the shape and device of ``like``."""
        key = (name, like.device, dtype)
        flat = self.buffers.get(key)
        if flat is None or flat.numel() < like.numel():
            flat = self.buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return flat[: like.numel()].view(like.shape)

    def generator(self, device: torch.device, seed: int) -> torch.Generator:
        """The thread's generator for ``device``, set to ``seed``."""
        generator = self.generators.get(device)
        if generator is None:
            generator = self.generators[device] = torch.Generator(device)
        return generator.manual_seed(seed)


SCRATCH = Scratch()


@functools.lru_cache(maxsize=1)
def worker_threads(count: int) -> ThreadPoolExecutor:
    """The threads that share the tiles of CPU parameters; each computes on its own core."""
    return ThreadPoolExecutor(count, "hizoo", initializer=torch.set_num_threads, initargs=(1,))


def run_packets(function: Callable[[Packet], Any], packets: Sequence[Packet]) -> Iterator[Any]:
    """Apply ``function`` to every packet, CPU packets on all cores; yields results in order."""
    on_cpu = [packet for packet in packets if packet[0][0].parameter.device.type == "cpu"]
    workers = min(MAX_WORKERS, torch.get_num_threads(), os.cpu_count() or 1)
    if len(on_cpu) < len(packets) or len(packets) < 2 or workers < 2:
        return map(function, packets)
    return worker_threads(workers).map(function, packets)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of noise and arithmetic for weights of ``tensor``'s dtype."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def inverse_root(hessian_minus_one: Tensor) -> Tensor:
    """1/√h of one tile, in a buffer that the next call overwrites."""
    root = SCRATCH.buffer("root", hessian_minus_one, compute_dtype(hessian_minus_one))
    return torch.add(hessian_minus_one, 1, out=root).rsqrt_()


def add_scaled_(target: Tensor, noise: Tensor, root: Tensor | None, scale: float) -> None:
    """Add ``scale`` u/√h to a tile in place; ``root`` None means h = 1."""
    if root is None:
        target.add_(noise, alpha=scale)
    else:
        target.addcmul_(noise, root, value=scale)


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")


class HiZOO(torch.optim.Optimizer):
    """Zeroth-order optimizer with a diagonal curvature estimate (module docstring: the mathematics).

    ``step(closure)`` does a whole step. ``estimate(closure)`` runs the forward passes alone and may be
    called several times before one ``step()``: the estimates share the noise, and their losses are
    averaged (gradient accumulation). Between ``estimate`` and ``step`` the parameters are shifted;
    ``restore()`` takes the shift back.

    Args:
        params: tensors or parameter groups. ``lr``, ``eps``, ``hessian_smooth`` and ``weight_decay``
            may differ between groups, and may change between steps (schedulers).
        lr: learning rate η, per unit of the projected gradient. Published runs: 1e-7 to 1e-6 for all
            parameters of a large model.
        eps: perturbation scale μ, in units of the weights. 0 is refused.
        hessian_smooth: smoothing α of h, from 0 (MeZO: two forward passes a step) to below 1.
        weight_decay: decoupled weight decay λ, multiplied by ``lr``.
        num_samples: number of directions u a step, averaged (n-SPSA, MeZO paper, appendix A).
        seed: the noise is a function of it and of the step's number.

    State: ``hessian_minus_one`` per parameter, h - 1 in the parameter's shape. In float32, h itself
    could not take in changes below 6e-8, which is all that α = 1e-10 ever makes; h - 1 can. Without it
    (MeZO) h is 1. The step's number is in ``param_groups``; so ``state_dict()`` resumes exactly.

    Attributes:
        projected_gradient: g of the last step (first group's μ; mean over the directions).
        curvature: c of the last step (likewise), 0 without curvature.
        skipped_steps: how many steps changed nothing since a loss was not finite.

    Raises:
        ValueError: an argument out of range, or a parameter that is not contiguous.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        hessian_smooth: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        num_samples: int = 1,
        seed: int = 0,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples!r}")
        defaults = {
            "lr": lr,
            "eps": eps,
            "hessian_smooth": hessian_smooth,
            "weight_decay": weight_decay,
            "seed": seed,
            "step": 0,
            "skipped_steps": 0,
        }
        self.num_samples = num_samples
        self.projected_gradient = math.nan
        self.curvature = 0.0
        self._slots: list[Slot] = []
        self._forget_estimates()
        super().__init__(params, defaults)

    # ---- public interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with its own ``lr``, ``eps``, ``hessian_smooth``, ``weight_decay``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_not_negative(lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])
        if group["eps"] == 0:
            raise ValueError("eps must be larger than 0, not 0")
        if not 0 <= group["hessian_smooth"] < 1:
            raise ValueError(f"hessian_smooth must be in [0, 1), not {group['hessian_smooth']!r}")
        self._slots = list(self._number_tiles())

    @property
    def skipped_steps(self) -> int:
        return self.param_groups[0]["skipped_steps"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float | None:
        """Apply the estimates made since the last step; with ``closure``, make one first.

        Returns the loss of ``closure``, None without. A step in which a loss was not finite takes the
        shift back, changes nothing else and counts in ``skipped_steps``.
        """
        loss = None if closure is None else self.estimate(closure)
        if not self._estimates:
            raise RuntimeError("step() needs a closure, or estimate(closure) before it")
        differences = torch.tensor(self._estimates, dtype=torch.float64).mean(dim=0).tolist()
        if all(math.isfinite(value) for pair in differences for value in pair):
            self._apply(differences)
        else:
            self.restore()
            for group in self.param_groups:
                group["skipped_steps"] += 1
        for group in self.param_groups:
            group["step"] += 1
        self._forget_estimates()
        return loss

    @torch.no_grad()
    def estimate(self, closure: Callable[[], Any]) -> float:
        """Run the forward passes of one batch: 2 a direction, and one unperturbed if α > 0.

        ``closure`` returns the loss of the batch, a number or a tensor of one, and must give the same
        loss for the same weights (no dropout). Returns the unperturbed loss, or without it the mean of
        the perturbed ones. If ``closure`` raises, the weights come back and the step starts anew.
        """
        with_curvature = any(group["hessian_smooth"] > 0 for group in self.param_groups)
        points = [(draw, sign) for draw in range(self.num_samples) for sign in (1, -1)]
        order = [None, *points] if with_curvature else points
        # Every other batch goes backwards, from where the one before it ended.
        if len(self._estimates) % 2:
            order.reverse()
        losses = {}
        try:
            for point in order:
                self._move_to(point)
                losses[point] = float(closure())
        except BaseException:
            self.restore()
            self._forget_estimates()
            raise
        center = losses.get(None, sum(losses.values()) / len(losses))
        self._estimates.append(
            [
                (
                    losses[draw, 1] - losses[draw, -1],
                    losses[draw, 1] + losses[draw, -1] - 2 * center if with_curvature else 0.0,
                )
                for draw in range(self.num_samples)
            ]
        )
        return center

    @torch.no_grad()
    def restore(self) -> None:
        """Take the shift back that ``estimate`` left on the parameters."""
        self._move_to(None)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, as of the last whole step; takes a shift back first."""
        self.restore()
        self._forget_estimates()
        return super().state_dict()

    # ---- noise and passes over the parameters

    def _forget_estimates(self) -> None:
        self._estimates: list[list[tuple[float, float]]] = []
        self._point: tuple[int, int] | None = None

    def _number_tiles(self) -> Iterator[Slot]:
        first_tile = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.is_contiguous():
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is not contiguous"
                    )
                rows = parameter.shape[0] if parameter.dim() > 1 else 1
                columns = parameter.numel() // rows if rows else 0
                on_cpu = parameter.device.type == "cpu"
                size = CPU_TILE_ELEMENTS if on_cpu else DEVICE_TILE_ELEMENTS
                grid = TileGrid(rows, columns, size)
                yield Slot(parameter, group, grid, first_tile)
                first_tile += len(grid)

    def _stream(self, draw: int) -> int:
        group = self.param_groups[0]
        return mix_seed(group["seed"], group["step"], draw)

    def _move_to(self, point: tuple[int, int] | None) -> None:
        """Shift the parameters from the point they are at, θ ± μ u/√h or θ itself, to ``point``."""
        scales: dict[int, int] = {}
        if self._point:
            scales[self._point[0]] = -self._point[1]
        if point:
            scales[point[0]] = scales.get(point[0], 0) + point[1]
        if any(scales.values()):
            shift = functools.partial(self._shift_packet, scales)
            for _ in run_packets(shift, cut_into_packets(self._slots)):
                pass
        self._point = point

    def _apply(self, differences: list[list[float]]) -> None:
        """Update h and θ with (l+ - l-, l+ + l- - 2 l0) of each direction; takes the shift back."""
        for slot in self._slots:
            state = self.state[slot.parameter]
            if slot.group["hessian_smooth"] > 0 and not state:
                state["hessian_minus_one"] = torch.zeros_like(slot.parameter)
        samples, eps = len(differences), self.param_groups[0]["eps"]
        self.projected_gradient = sum(first for first, _ in differences) / samples / (2 * eps)
        self.curvature = sum(abs(second) for _, second in differences) / samples / (2 * eps**2)
        update = functools.partial(self._update_packet, differences)
        for _ in run_packets(update, cut_into_packets(self._slots)):
            pass
        self._point = None

    def _noise(self, slot: Slot, stream: int, tile: int, like: Tensor) -> Tensor:
        """N(0, 1) numbers of one tile, in a buffer that the next call overwrites."""
        noise = SCRATCH.buffer("noise", like, compute_dtype(like))
        seed = tile_seed(stream, slot.first_tile + tile)
        return noise.normal_(generator=SCRATCH.generator(like.device, seed))

    def _shift_packet(self, scales: dict[int, int], packet: Packet) -> None:
        """Add ``scale`` μ u/√h to the tiles of a packet, for every draw of u and its scale."""
        streams = {draw: self._stream(draw) for draw in scales}
        for slot, tiles in packet:
            weights = slot.matrix(slot.parameter)
            hessian = self.state[slot.parameter].get("hessian_minus_one")
            for tile in tiles:
                place = slot.grid[tile]
                target = weights[place]
                root = None if hessian is None else inverse_root(slot.matrix(hessian)[place])
                for draw, scale in scales.items():
                    noise = self._noise(slot, streams[draw], tile, target)
                    add_scaled_(target, noise, root, scale * slot.group["eps"])

    def _update_packet(self, differences: list[list[float]], packet: Packet) -> None:
        """Take the shift back and update h and θ in the tiles of a packet."""
        samples = len(differences)
        streams = [self._stream(draw) for draw in range(samples)]
        shifted_draw, shifted_sign = self._point or (None, 0)
        for slot, tiles in packet:
            lr, eps, smooth, decay = (
                float(slot.group[name]) for name in ("lr", "eps", "hessian_smooth", "weight_decay")
            )
            gradients = [first / (2 * eps) / samples for first, _ in differences]
            curvatures = [abs(second) / (2 * eps**2) / samples for _, second in differences]
            weights = slot.matrix(slot.parameter)
            hessian = self.state[slot.parameter].get("hessian_minus_one")
            for tile in tiles:
                place = slot.grid[tile]
                target = weights[place]
                offset = None if hessian is None else slot.matrix(hessian)[place]
                root = None if offset is None else inverse_root(offset)
                growth = SCRATCH.buffer("growth", target, compute_dtype(target)).fill_(-smooth)
                direction = SCRATCH.buffer("direction", target, compute_dtype(target))
                for draw, stream in enumerate(streams):
                    noise = self._noise(slot, stream, tile, target)
                    if draw == shifted_draw:
                        add_scaled_(target, noise, root, -shifted_sign * eps)
                    if offset is not None:
                        growth.addcmul_(noise, noise, value=smooth * curvatures[draw])
                    if samples > 1 and draw == 0:
                        torch.mul(noise, gradients[draw], out=direction)
                    elif samples > 1:
                        direction.add_(noise, alpha=gradients[draw])
                if offset is not None and smooth > 0:
                    # h <- h (1 - α + α c u²), with h - 1 in store: in float32 h would swallow it.
                    offset.addcmul_(growth, torch.add(offset, 1, out=root))
                    root = inverse_root(offset)
                if decay:
                    target.mul_(1 - lr * decay)
                if samples == 1:
                    add_scaled_(target, noise, root, -lr * gradients[0])
                else:
                    add_scaled_(target, direction, root, -lr)
