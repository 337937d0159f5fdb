"""What processes share of a step, without processes; a signal during training."""

from __future__ import annotations

import itertools
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from training import processes as sharing
from training.callbacks import SaveOnInterrupt
from training.processes import BORROWED, own_part


def act_as(process: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(process_index=process, num_processes=processes)
    monkeypatch.setattr(sharing, "PartialState", lambda: state)


def test_every_example_is_one_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for processes, examples in itertools.product((1, 2, 3, 4), (1, 2, 4, 7)):
        shares = []
        for process in range(processes):
            act_as(process, processes, monkeypatch)
            part = own_part(lambda own: {"examples": own}, [*range(examples)])
            assert part["examples"]
            # A borrowed example stands in where there is none.
            shares.append([] if BORROWED in part else part["examples"])
        assert [*itertools.chain(*shares)] == [*range(examples)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_signal_saves_logs_and_stops() -> None:
    for number in SaveOnInterrupt.SIGNALS:
        before = signal.getsignal(number)
        callback, control = SaveOnInterrupt(), TrainerControl()
        arguments = SimpleNamespace(world_size=1)
        callback.on_train_begin(arguments, None, control)
        callback.on_step_end(arguments, None, control)
        assert not control.should_save and not control.should_training_stop
        signal.raise_signal(number)
        callback.on_step_end(arguments, None, control)
        callback.on_train_end(arguments, None, control)
        assert callback.received == signal.Signals(number).name
        assert control.should_save and control.should_log and control.should_training_stop
        assert signal.getsignal(number) is before
