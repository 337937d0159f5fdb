"""The optimizer in others' hands: frozen weights, copies, autocast, accelerate, exceptions."""

from __future__ import annotations

import copy
import itertools
import pickle
import signal
import warnings

import accelerate
import pytest
import torch
from oracle_hizoo import read_noise
from test_hizoo import (
    largest_difference,
    make_loss,
    make_parameters,
    model_loss,
    quadratic_model,
    small_chunks,  # noqa: F401 - a fixture for every test here too
)
from tiny_models import TINY_OPT
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hizoo import HiZOO, Layers
from zeroth_order import kernels


@pytest.mark.parametrize(
    "failing_chunk, hessian", [(0, "full"), (7, "lowrank"), (20, "full"), (20, "lowrank")]
)
def test_a_shift_that_fails_in_the_middle_is_taken_back(
    failing_chunk, hessian, monkeypatch
) -> None:
    parameters = make_parameters(torch.float64)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = HiZOO(parameters, eps=0.1, hessian_smooth=1e-2, hessian=hessian)
    perturb, calls = kernels.perturb, itertools.count()

    def fails_once(*arguments):
        if next(calls) == failing_chunk:
            raise KeyboardInterrupt
        return perturb(*arguments)

    monkeypatch.setattr(kernels, "perturb", fails_once)
    with pytest.raises(KeyboardInterrupt):
        optimizer.estimate(lambda: make_loss()(parameters))
    assert next(calls) > failing_chunk
    assert largest_difference(parameters, before) < 1e-15
    assert not optimizer._estimates
    # What comes then is what comes without the exception.
    other = HiZOO(make_parameters(torch.float64), eps=0.1, hessian_smooth=1e-2, hessian=hessian)
    for one in (optimizer, other):
        own = one.param_groups[0]["params"]
        one.step(lambda own=own: make_loss()(own))
    assert largest_difference(parameters, other.param_groups[0]["params"]) < 1e-12


@pytest.mark.parametrize("hessian", ["full", "lowrank"])
@pytest.mark.parametrize("function", ["perturb", "update"])
def test_an_interrupt_waits_until_every_weight_is_written(function, hessian, monkeypatch) -> None:
    parameters = make_parameters(torch.float64)
    before = [parameter.detach().clone() for parameter in parameters]
    settings = {"lr": 1e-3, "eps": 0.1, "hessian_smooth": 1e-2, "hessian": hessian}
    optimizer = HiZOO(parameters, **settings)
    real, calls = getattr(kernels, function), itertools.count()

    def interrupted_after_it_has_written(*arguments):
        written = real(*arguments)
        if next(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return written

    with monkeypatch.context() as patched:
        patched.setattr(kernels, function, interrupted_after_it_has_written)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(lambda: make_loss()(parameters))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if function == "perturb":
        assert largest_difference(parameters, before) < 1e-15
        optimizer.step(lambda: make_loss()(parameters))
    other = make_parameters(torch.float64)
    HiZOO(other, **settings).step(lambda: make_loss()(other))
    assert optimizer.param_groups[0]["step"] == 1
    assert largest_difference(parameters, other) < 1e-12


@pytest.mark.parametrize("hessian", ["full", "lowrank"])
@pytest.mark.parametrize("failing_sum", [0, 20, 21])
def test_an_update_that_fails_leaves_no_weight_shifted(failing_sum, hessian, monkeypatch) -> None:
    """Before a chunk's shift is taken back, and after it; the others are whole or as they were."""
    parameters, whole = make_parameters(torch.float64), make_parameters(torch.float64)
    before = [parameter.detach().clone() for parameter in parameters]
    settings = {"lr": 1e-3, "eps": 0.1, "hessian_smooth": 1e-2, "hessian": hessian}
    HiZOO(whole, **settings).step(lambda: make_loss()(whole))
    optimizer = HiZOO(parameters, **settings)
    weighted_sum, sums = kernels.weighted_sum, itertools.count()

    def fails_once(*arguments):
        if next(sums) == failing_sum:
            raise torch.OutOfMemoryError("no room")
        return weighted_sum(*arguments)

    monkeypatch.setattr(kernels, "weighted_sum", fails_once)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(lambda: make_loss()(parameters))
    moved = 0
    for parameter, old, new in zip(parameters, before, whole, strict=True):
        updated = (parameter - new).abs() < 1e-12
        assert (updated | ((parameter - old).abs() < 1e-12)).all()
        moved += updated.sum()
    assert (moved > 0) == (failing_sum > 1)
    assert optimizer.param_groups[0]["step"] == 0
    optimizer.restore()
    optimizer.step(lambda: make_loss()(parameters))


def test_frozen_parameters_are_left_alone() -> None:
    model = quadratic_model(torch.float32)
    frozen = model[0].weight.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = HiZOO(model.parameters(), lr=1e-3, hessian_smooth=1e-2)
    alone = copy.deepcopy(model)
    optimizer.step(lambda: model_loss(model))
    assert torch.equal(frozen, before) and frozen not in optimizer.state
    assert not torch.equal(model[2].weight, alone[2].weight)
    # Thawed between two steps it is trained, and every parameter keeps the noise that it had.
    noise = read_noise(optimizer)
    frozen.requires_grad_(True)
    optimizer.step(lambda: model_loss(model))
    assert not torch.equal(frozen, before) and frozen in optimizer.state
    assert len(noise) == 4 and optimizer.weights.parameters[0].number == 0
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        optimizer.step(lambda: model_loss(model))
    with pytest.raises(ValueError, match="nothing to train"):
        HiZOO(model.parameters())


def test_state_with_frozen_parameters_is_loaded_by_position() -> None:
    def optimizer_of_second() -> tuple[nn.Module, HiZOO]:
        model = quadratic_model(torch.float32)
        model[0].requires_grad_(False)
        return model, HiZOO(model.parameters(), lr=1e-3, hessian_smooth=1e-2)

    (model, optimizer), (other, resumed) = optimizer_of_second(), optimizer_of_second()
    optimizer.step(lambda: model_loss(model))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for one, its in ((optimizer, model), (resumed, other)):
        one.step(lambda its=its: model_loss(its))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_dtypes_that_cannot_be_trained_are_refused() -> None:
    ordinary = nn.Parameter(torch.zeros(2))
    whole_numbers = nn.Parameter(torch.zeros(3, 2, dtype=torch.int32), requires_grad=False)
    HiZOO([whole_numbers, ordinary])  # left alone, as what is frozen
    with pytest.raises(ValueError, match="nothing to train"):
        HiZOO([whole_numbers])
    with pytest.raises(ValueError, match=r"shape \(3, 2\) is complex64: give float64, float32"):
        HiZOO([ordinary, nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))])


def test_a_copy_steps_itself_after_a_scheduler_was_made() -> None:
    model = quadratic_model(torch.float32)
    layers = Layers(model)
    optimizer = HiZOO(model.parameters(), lr=1e-3, hessian_smooth=1e-2, layers=layers)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.step(lambda: model_loss(model))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for other, its_optimizer in pairs:
        its_optimizer.step(lambda other=other: model_loss(other))
        assert largest_difference(list(model.parameters()), before) == 0
    optimizer.step(lambda: model_loss(model))
    for other, _ in pairs:
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layerwise", [False, True])
def test_autocast_around_a_step_sees_the_perturbation(layerwise) -> None:
    model = quadratic_model(torch.float32)
    layers = Layers(model) if layerwise else None
    # A direction along which the loss changes by far more than bfloat16 rounds.
    settings = {"lr": 0.0, "eps": 1e-2, "hessian_smooth": 0.0, "layers": layers, "seed": 2}
    expected = HiZOO(model.parameters(), **settings)
    expected.step(lambda: model_loss(model))
    optimizer = HiZOO(model.parameters(), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(lambda: model_loss(model))
        gradient = expected.projected_gradient
        assert optimizer.projected_gradient == pytest.approx(gradient, rel=0.3)
        # Nor does what comes next see the perturbed weights that the last loss has cast.
        inside = model(torch.ones(6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(torch.ones(6)), inside)


def test_a_loss_that_changes_by_itself_is_noticed_at_the_first_step() -> None:
    model = nn.Sequential(quadratic_model(torch.float32), nn.Dropout(0.5))
    for training in (True, False):
        model.train(training)
        optimizer = HiZOO(model.parameters(), lr=0.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step(lambda: model_loss(model))
        assert len(caught) == training
        assert all("leave dropout out" in str(one.message) for one in caught)


def test_a_loss_that_differs_by_rounding_is_no_news() -> None:
    """As from kernels that add in any order, where the perturbation changes nothing."""
    for dtype, noise in ((torch.float32, 1e-7), (torch.bfloat16, 4e-3)):
        losses = itertools.cycle([2.0, 2.0 * (1 + noise)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            HiZOO(make_parameters(dtype), eps=1e-2).step(lambda losses=losses: next(losses))


def test_perturbation_scale_that_does_not_fit_is_refused_before_anything_moves() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parameters = make_parameters(dtype)
        before = [parameter.detach().clone() for parameter in parameters]
        zeros = nn.Parameter(torch.zeros(5000, dtype=dtype))  # as LoRA's second matrices
        for eps, message in [(1e30, "eps 1e[+]30 would destroy"), (1e-30, "eps 1e-30 is below")]:
            for trained in (parameters, [*parameters, zeros]):
                optimizer = HiZOO(trained, eps=eps)
                with pytest.raises(ValueError, match=message):
                    optimizer.step(lambda: 1.0)
                assert largest_difference(parameters, before) == 0, dtype


def test_perturbation_scale_that_fits_most_weights_is_taken() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        zeros = nn.Parameter(torch.zeros(9, dtype=dtype))
        HiZOO([zeros]).step(lambda: 1.0)
        # Norms that are 1 do not feel what matrices feel, and biases may be tiny.
        norms, biases = torch.ones(99, dtype=dtype), torch.full((99,), 1e-7, dtype=dtype)
        matrix = torch.full((99, 99), 0.02, dtype=dtype)
        groups = [{"params": [nn.Parameter(tensor)]} for tensor in (norms, biases, matrix)]
        HiZOO(groups, eps=1e-4).step(lambda: 1.0)


def test_half_precision_in_place_takes_no_shift_that_it_cannot_return() -> None:
    model = quadratic_model(torch.bfloat16)
    with pytest.raises(ValueError, match="would destroy the weights"):
        HiZOO(model.parameters(), eps=10.0).check_perturbation_scale()
    layers = Layers(model)
    HiZOO(model.parameters(), eps=10.0, layers=layers).check_perturbation_scale()


def test_batches_count_by_their_weight() -> None:
    """As one batch of all: (2 l₁ + 6 l₂) / 8."""
    moved = []
    for parts in ([(0, 2.0), (1, 6.0)], [(None, None)]):
        parameters = make_parameters(torch.float64)
        losses = [make_loss(0), make_loss(1)]

        def loss(part, parameters=parameters, losses=losses):
            if part is not None:
                return losses[part](parameters)
            return (2 * losses[0](parameters) + 6 * losses[1](parameters)) / 8

        optimizer = HiZOO(parameters, lr=1e-3, hessian_smooth=1e-2)
        for part, weight in parts:
            optimizer.estimate(lambda part=part, loss=loss: loss(part), weight)
        optimizer.step()
        moved.append((optimizer.projected_gradient, optimizer.curvature, parameters))
    assert moved[0][:2] == pytest.approx(moved[1][:2], rel=1e-6)
    assert largest_difference(moved[0][2], moved[1][2]) < 1e-9


def test_accelerate_returns_the_loss() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = quadratic_model(torch.float32)
    optimizer = accelerator.prepare(HiZOO(model.parameters(), lr=1e-3))
    scheduler = accelerator.prepare(
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    )
    expected = model_loss(model).item()
    assert optimizer.step(lambda: model_loss(model)) == pytest.approx(expected, rel=1e-6)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-4


def test_a_plain_trainer_is_told_which_one_to_take(tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_OPT)
    rows = [{"input_ids": [2, 5, 6], "labels": [2, 5, 6]}]
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True)
    optimizers = HiZOO(model.parameters()), None
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=optimizers)
    with pytest.raises(RuntimeError, match="take ForwardOnlyMixin"):
        trainer.train()
