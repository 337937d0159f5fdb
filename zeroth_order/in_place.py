"""Weights that are shifted where they are: no memory beside one chunk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from zeroth_order.rounding import is_half
from zeroth_order.signals import signals_wait
from zeroth_order.weights import GroupStep, Shift, Weights


class InPlaceWeights(Weights):
    """Shifts the weights and takes the shift back, which rounds by a unit in the last place."""

    def loss_at(self, closure: Callable[[], Any], direction: int, sign: float) -> float:
        """Return the loss at θ + ``sign`` μ u/√h; the weights stay shifted."""
        self._move_to((direction, sign) if sign else None)
        return float(closure())

    def restore(self) -> None:
        """Take the shift back. If this raises, the shift is whole or gone; call again."""
        self._move_to(None)

    def _move_to(self, wanted: Shift | None) -> None:
        """Shift the weights from where they are, first to θ if the direction changes."""
        if self.shift and (wanted is None or wanted[0] != self.shift[0]):
            direction, sign = self.shift
            self._add(direction, -sign, None)
        if wanted and wanted != self.shift:
            direction, sign = wanted
            self._add(direction, sign - (self.shift[1] if self.shift else 0.0), wanted)

    def _add(self, direction: int, scale: float, arrives_at: Shift | None) -> None:
        """Add ``scale`` μ u/√h to all weights or, if it raises, to none."""
        written = 0
        with signals_wait():
            try:
                for chunk, noise in self.chunks_with_noise(self.parameters, direction):
                    self.perturb_chunk(chunk, noise, scale, chunk.of.parameter)
                    written += 1
            except BaseException:
                self._add_to_chunks(direction, -scale, 0, written)
                raise
            self.shift = arrives_at

    def _add_to_chunks(self, direction: int, scale: float, start: int, stop: int | None) -> None:
        chunks = self.chunks_with_noise(self.parameters, direction)
        for chunk, noise in itertools.islice(chunks, start, stop):
            self.perturb_chunk(chunk, noise, scale, chunk.of.parameter)

    def update(self, steps: Sequence[GroupStep]) -> None:
        """Take the shift back, then update h and θ, in one pass over the noise in full precision.

        Half precision comes back to θ first: it rounds to the nearest there, and stochastically in
        the update. So do weights with a low-rank h, which the update changes as a whole.
        """
        if any(is_half(trained.parameter.dtype) or trained.low_rank for trained in self.parameters):
            self.restore()
        try:
            super().update(steps)
        except BaseException:
            # A kernel that fails, for want of memory, has written nothing.
            if self.shift:
                self._add_to_chunks(self.shift[0], -self.shift[1], self.updated_chunks, None)
            raise
        finally:
            self.shift = None
