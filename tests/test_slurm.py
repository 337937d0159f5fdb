"""Slurm's variables as torchrun's; a real Slurm is in tests/slurm."""

from __future__ import annotations

import pytest

from command_line.slurm import first_host, take_slurm_variables, tasks_of_this_node
from utils import InputError

STEP = {
    **{"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "5"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"},
    **{"SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_STEP_TASKS_PER_NODE": "3,2"},
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


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "2", "RANK": "1"},  # torchrun's, in a step of its own
        {"SLURM_STEP_NUM_TASKS": ""},  # the job script
    ],
)
def test_other_processes_are_left_alone(changed: dict[str, str]) -> None:
    environment = STEP | changed
    take_slurm_variables(environment)
    assert environment == STEP | changed
    nothing: dict[str, str] = {}
    take_slurm_variables(nothing)
    assert nothing == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("node07", "node07"),
        ("node[07-09,12],other", "node07"),
        ("a,b", "a"),
        ("rack[1,3]-gpu", "rack1-gpu"),
        ("my-node-[10-12]", "my-node-10"),
    ],
)
def test_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_a_node() -> None:
    tasks = [
        tasks_of_this_node({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": str(node)})
        for node in range(3)
    ]
    assert tasks == [4, 4, 3]


@pytest.mark.parametrize(
    "odd",
    [
        *({"SLURM_STEP_NUM_TASKS": "x"}, {"SLURM_JOB_ID": ""}, {"SLURM_STEP_ID": "batch"}),
        *({"SLURM_STEP_TASKS_PER_NODE": "3(x"}, {"SLURM_NODEID": "7"}),
    ],
    ids=str,
)
def test_odd_variables_are_one_line(odd: dict[str, str]) -> None:
    with pytest.raises(InputError, match="the variables of srun"):
        take_slurm_variables(STEP | odd)
    with pytest.raises(InputError, match="the variables of srun"):
        take_slurm_variables({name: STEP[name] for name in STEP if name != "SLURM_LOCALID"})
