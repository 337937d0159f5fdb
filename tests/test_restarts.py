"""Where processes that torchrun starts again meet; torchrun itself: tests/by_hand/restarts.py."""

from __future__ import annotations

import threading

import pytest
from torch.distributed import TCPStore

from command_line.restarts import PREFIX, own_store

SIZE = 3


def start_of(rank: int, agent: TCPStore) -> dict[str, str]:
    """The variables of a process that the agent starts."""
    return {
        **{"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "localhost"},
        **{"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        "TORCHELASTIC_MAX_RESTARTS": "2",
    }


def test_every_start_meets_at_a_store_of_its_own() -> None:
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # A process that was killed before the first one heard of it, and one that never said thanks.
    agent.set(f"{PREFIX}/asks/1", "killed")
    agent.set(f"{PREFIX}/asks/2", "killed, too")
    ports: list[int] = []
    for _ in range(2):
        met: dict[int, bytes] = {}
        everyone = threading.Barrier(SIZE)

        def process(rank: int, met: dict = met, everyone: threading.Barrier = everyone) -> None:
            environment = start_of(rank, agent)
            with own_store(environment):
                assert environment["TORCHELASTIC_USE_AGENT_STORE"] == "False"
                port = int(environment["MASTER_PORT"])
                store = TCPStore("localhost", port, SIZE, rank == 0, multi_tenant=True)
                if rank == 0:
                    ports.append(port)
                    store.set("word", str(port))
                met[rank] = store.get("word")
                everyone.wait(60)

        # The first process comes last.
        threads = [threading.Thread(target=process, args=(rank,)) for rank in (2, 1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert met == dict.fromkeys(range(SIZE), str(ports[-1]).encode())
    assert len({agent.port, *ports}) == 3


@pytest.mark.parametrize(
    "changed", [{"TORCHELASTIC_MAX_RESTARTS": "0"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}]
)
def test_processes_that_nobody_restarts_are_left_alone(changed: dict[str, str]) -> None:
    environment = {**dict.fromkeys(("RANK", "WORLD_SIZE"), "2"), "MASTER_PORT": "1"}
    environment |= {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= changed
    before = dict(environment)
    with own_store(environment):
        assert environment == before
    with own_store({}):
        pass
