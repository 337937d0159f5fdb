"""A meeting place of its own for every start of the processes that torchrun has started.

With ``torchrun --max-restarts`` all starts share the store of torchrun's agent. It still holds the
addresses of the processes that were killed, and a process that reads one before the new process has
written its own is refused the connection, or waits for nobody.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, MutableMapping
from datetime import timedelta

from torch.distributed import Store, TCPStore

PREFIX = "hizoo/start"
# Between two looks at who has come, and until a start is given up: torch's own time for gloo.
PAUSE, PATIENCE = 0.02, timedelta(minutes=30)


@contextlib.contextmanager
def own_store(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Within the block torch.distributed meets at a new store of this start's first process.

    The variables that ``init_process_group`` reads name it. Nothing is changed where torchrun does
    not restart processes.
    """
    of_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not of_agent or int(environment.get("TORCHELASTIC_MAX_RESTARTS") or 0) == 0:
        yield
        return
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    agent = TCPStore(host, port, is_master=False, timeout=PATIENCE)
    if rank == 0:
        # ``init_process_group`` takes up a server of its own process that has this port. It lives
        # as long as this name.
        own = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        tell_the_others(agent, own.port, size)
        port = own.port
    else:
        port = ask_the_first(agent, rank)
    environment["MASTER_PORT"] = str(port)
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    yield


def tell_the_others(store: Store, port: int, size: int) -> None:
    """Answer every other process of this start with ``port``, until all have thanked for it.

    What an earlier start has left is answered too, and nobody thanks for that.

    Raises:
        TimeoutError: one has not come.
    """
    missing, end = set(range(1, size)), time.monotonic() + PATIENCE.total_seconds()
    answered: set[bytes] = set()
    start = uuid.uuid4().hex
    while missing:
        for rank in sorted(missing):
            if store.check([f"{PREFIX}/asks/{rank}"]):
                token = store.get(f"{PREFIX}/asks/{rank}")
                if token not in answered:
                    store.set(f"{PREFIX}/answer/{token.decode()}", f"{port} {start}")
                    answered.add(token)
            if store.check([f"{PREFIX}/thanks/{start}/{rank}"]):
                missing.discard(rank)
        if time.monotonic() > end:
            raise TimeoutError(f"of {size} processes rank {min(missing)} has not started")
        time.sleep(PAUSE)


def ask_the_first(store: Store, rank: int) -> int:
    """Return the port that the first process of this very start answers."""
    token = uuid.uuid4().hex
    store.set(f"{PREFIX}/asks/{rank}", token)
    port, start = store.get(f"{PREFIX}/answer/{token}").decode().split()
    store.set(f"{PREFIX}/thanks/{start}/{rank}", "1")
    return int(port)
