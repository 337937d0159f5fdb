"""Forward passes that run in turn, a block at a time, as if each had the model for itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from zeroth_order.signals import signals_wait
from zeroth_order.traffic import Block

# The hooks of one module, by their numbers.
Hooks = dict[int, Callable[..., Any]]


def hooks_of(model: nn.Module) -> list[Hooks]:
    """Return the forward hooks of all modules, as torch keeps them."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    return [getattr(module, kind) for module in model.modules() for kind in kinds]


class Abandoned(BaseException):
    """Ends a forward pass that nobody waits for any more."""


class ForwardPass:
    """A forward pass in a thread of its own; it runs only between ``resume`` and its next stop."""

    def __init__(
        self,
        closure: Callable[[], Any],
        threads: ThreadPoolExecutor,
        device: torch.device,
        hooks: Sequence[Hooks],
    ) -> None:
        # The block that it has stopped before; None: it has not begun, or it has ended.
        self.before: Block | None = None
        self.loss = float("nan")
        self._closure, self._device = closure, device
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._is_abandoned = False
        self._random = self._exchange_random(None)
        # Hooks that the pass has registered are there only while it runs.
        self._hooks, self._own_hooks = hooks, list[tuple[Hooks, Hooks]]()
        self._ended = threads.submit(self._run)

    def _run(self) -> None:
        self._go.acquire()
        try:
            if self._is_abandoned:
                return
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with torch.no_grad():
                self.loss = float(self._closure())
        finally:
            self.before = None
            self._stopped.release()

    def resume(self) -> None:
        """Run on; return when the pass has stopped before a block, or ended.

        A signal waits until then. Whatever the pass raises is raised here.
        """
        # Under autocast torch keeps weights that it has cast, and would not see other ones.
        torch.clear_autocast_cache()
        random = self._exchange_random(self._random)
        others = {number for hooks in self._hooks for number in hooks}
        for hooks, own in self._own_hooks:
            hooks.update(own)
        with signals_wait():
            self._go.release()
            self._stopped.acquire()
        self._own_hooks = []
        for hooks in self._hooks:
            if own := {number: hook for number, hook in hooks.items() if number not in others}:
                self._own_hooks.append((hooks, own))
                for number in own:
                    del hooks[number]
        self._random = self._exchange_random(random)
        if self.before is None:
            self._ended.result()

    def _exchange_random(self, wanted: list[Tensor] | None) -> list[Tensor]:
        """Return the state of random numbers, and take on another one."""
        is_cuda, found = self._device.type == "cuda", [torch.get_rng_state()]
        if is_cuda:
            found.append(torch.cuda.get_rng_state(self._device))
        if wanted:
            torch.set_rng_state(wanted[0])
        if wanted and is_cuda:
            torch.cuda.set_rng_state(wanted[1], self._device)
        return found

    def wait_before(self, block: Block) -> None:
        """Stop before a block; the pass itself calls this."""
        self.before = block
        self._stopped.release()
        self._go.acquire()
        self.before = None
        if self._is_abandoned:
            raise Abandoned

    def abandon(self) -> None:
        """End the pass, if it has not ended."""
        if not self._ended.done():
            self._is_abandoned = True
            self._go.release()
            with contextlib.suppress(BaseException):
                self._ended.result()
