"""A signal during training saves a checkpoint."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from training.callbacks import SaveOnInterrupt


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_signal_saves_logs_and_stops(name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    callback, control = SaveOnInterrupt(), TrainerControl()
    arguments = SimpleNamespace(world_size=1)
    callback.on_train_begin(arguments, None, control)
    callback.on_step_end(arguments, None, control)
    assert not control.should_save and not control.should_training_stop
    signal.raise_signal(number)
    callback.on_step_end(arguments, None, control)
    callback.on_train_end(arguments, None, control)
    assert callback.received == name
    assert control.should_save and control.should_log and control.should_training_stop
    assert signal.getsignal(number) is before
