"""Slurm's variables as torchrun's, and what is refused of both; a real Slurm is in tests/slurm."""

from __future__ import annotations

import pytest

from command_line.launchers import (
    check_variables,
    first_host,
    take_slurm_variables,
    take_store_of_restart,
    tasks_of_this_node,
)
from utils import InputError

STEP = {
    **{"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "5"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"},
    **{"SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_STEP_TASKS_PER_NODE": "3,2"},
}
RANKS = {
    **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
}


def test_tasks_of_a_step_are_processes_of_a_job() -> None:
    environment = dict(STEP)
    take_slurm_variables(environment)
    port = int(environment.pop("MASTER_PORT"))
    assert 20000 <= port < 40000
    assert environment == STEP | {
        **{"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2"},
        "MASTER_ADDR": "gpu007",
    }
    other = STEP | {"SLURM_STEP_ID": "4"}
    take_slurm_variables(other)
    assert int(other["MASTER_PORT"]) != port
    # Job scripts often export some of them; the rank is each task's own.
    exported = STEP | {"WORLD_SIZE": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    take_slurm_variables(exported)
    assert (exported["RANK"], exported["MASTER_PORT"]) == ("3", "1234")


def test_other_processes_are_left_alone() -> None:
    for changed in (
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "2", "RANK": "1"},  # torchrun's, in a step of its own
        {"SLURM_STEP_NUM_TASKS": ""},  # the job script
    ):
        environment = STEP | changed
        take_slurm_variables(environment)
        assert environment == STEP | changed
    nothing: dict[str, str] = {}
    take_slurm_variables(nothing)
    check_variables(nothing)
    assert nothing == {}


def test_first_host_of_a_list() -> None:
    for nodes, first in (
        *(("localhost", "localhost"), ("node07", "node07"), ("node[07-09,12],other", "node07")),
        *(("a,b", "a"), ("rack[1,3]-gpu", "rack1-gpu"), ("my-node-[10-12]", "my-node-10")),
        ("rack[1-2]n[3-4],other", "rack1n3"),
    ):
        assert first_host({"SLURM_STEP_NODELIST": nodes}) == first


def test_tasks_of_a_node() -> None:
    tasks = [
        tasks_of_this_node({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": str(node)})
        for node in range(3)
    ]
    assert tasks == [4, 4, 3]


def test_odd_variables_are_one_line() -> None:
    """The line names the variable and its value, or says that it is not set."""
    failures = []
    for good, cases in (
        (
            STEP,
            {
                "SLURM_STEP_NUM_TASKS": ["x", "0", "-2", "5.0", "a[$(touch x)]"],
                **{"SLURM_JOB_ID": ["", "7_1"], "SLURM_STEP_ID": ["batch", None]},
                **{"SLURM_PROCID": ["5", "one", ""], "SLURM_LOCALID": ["2", None]},
                "SLURM_STEP_TASKS_PER_NODE": ["3(x", "", "3,0", "2(x0)", "1(x9999999999)", None],
                **{"SLURM_NODEID": ["7", "x"], "SLURM_STEP_NODELIST": ["", "[", None]},
            },
        ),
        (
            RANKS,
            {
                "RANK": ["2", "-1", "x", "", "1.0", None],
                "WORLD_SIZE": ["0", "two", "", "99999999999"],
                **{"LOCAL_RANK": ["2", "x", None], "LOCAL_WORLD_SIZE": ["0", "3", "x"]},
                "MASTER_PORT": ["0", "65536", "http", None],
                "MASTER_ADDR": ["", "no such host", "a" * 300, None],
            },
        ),
    ):
        for name, values in cases.items():
            for value in values:
                environment = {each: word for each, word in good.items() if each != name}
                environment |= {} if value is None else {name: value}
                said = f"{name} is not set: expected" if value is None else f"{name}={value}: expec"
                try:
                    take_slurm_variables(environment)
                    check_variables(environment)
                    failures.append((name, value, "taken"))
                except InputError as error:
                    if not str(error).startswith(said) or "\n" in str(error):
                        failures.append((name, value, str(error)))
    assert not failures


def test_a_rank_needs_a_world() -> None:
    for name in ("RANK", "LOCAL_RANK"):
        with pytest.raises(InputError, match=f"^{name}=0: expected WORLD_SIZE beside it"):
            check_variables({name: "0"})
    with pytest.raises(InputError, match=r"^OMPI_COMM_WORLD_SIZE=2: expected one process"):
        check_variables({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})
    alone = {"WORLD_SIZE": "1"}
    for good in (RANKS, alone, alone | {"RANK": "0"}, {"PMI_SIZE": "1"}, RANKS | {"PMI_SIZE": "2"}):
        check_variables(good)


def test_odd_variables_of_a_restart_are_one_line() -> None:
    again = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "x"}
    with pytest.raises(InputError, match=r"^TORCHELASTIC_RESTART_COUNT=x: expected"):
        take_store_of_restart(again)
