"""What processes share of a step, without processes; a signal during training."""

from __future__ import annotations

import itertools
import math
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl

from training import processes as sharing
from training.callbacks import SaveOnInterrupt
from training.processes import BORROWED, Exchange, SharedDirections, check_agreement, own_part
from utils import Disagreement


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


def test_every_point_is_one_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [None, *((draw, sign) for draw in range(5) for sign in (1.0, -1.0))]
    losses = {point: 0.1 + number for number, point in enumerate(points)}
    sums = []
    for process in range(2):
        act_as(process, 2, monkeypatch)
        exchange = Exchange(torch.device("cpu"))
        monkeypatch.setattr(exchange, "sum", lambda tensor: sums.append(tensor) or tensor)
        shared = SharedDirections(5, exchange)
        own = {p: loss if shared.owns(p) else math.nan for p, loss in losses.items()}
        assert 4 <= sum(map(math.isfinite, own.values())) <= 7
        shared.exchanged(own)
    assert sum(sums).tolist() == [*losses.values()]
    assert (sums[0] * sums[1]).count_nonzero() == 0


def test_processes_with_other_weights_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*checksums: int) -> None:
        monkeypatch.setattr(sharing, "gather_object", lambda own: [*checksums])
        check_agreement(checksums[0], 3)

    act_as(0, 4, monkeypatch)
    compare(5, 5, 5, 5)
    with pytest.raises(Disagreement, match="after step 3 the weights of rank 2 differ from"):
        compare(5, 5, 7, 5)
    with pytest.raises(Disagreement, match="of rank 0, 1 differ"):
        compare(6, 7)
    act_as(0, 1, monkeypatch)
    other: Any = None
    monkeypatch.setattr(sharing, "gather_object", other)
    check_agreement(5, 3)


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
