"""torchrun's variables, and those of other launchers; a real Slurm is in tests/slurm."""

from __future__ import annotations

import pytest

from command_line.starting import check_variables, take_store_of_restart
from utils import InputError

RANKS = {
    **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
}


def test_odd_variables_are_one_line() -> None:
    """The line names the variable and its value, or says that it is not set."""
    failures = []
    for good, cases in (
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
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        said = rf"^{name}=2: expected one process; start several with torchrun"
        with pytest.raises(InputError, match=said):
            check_variables({name: "2"})
        check_variables({name: "1"})
        check_variables({name: ""})
    alone = {"WORLD_SIZE": "1"}
    for good in (RANKS, alone, alone | {"RANK": "0"}, {"PMI_SIZE": "1"}, RANKS | {"PMI_SIZE": "2"}):
        check_variables(good)


def test_odd_variables_of_a_restart_are_one_line() -> None:
    again = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "x"}
    with pytest.raises(InputError, match=r"^TORCHELASTIC_RESTART_COUNT=x: expected"):
        take_store_of_restart(again)
