"""Streamed weights against the layer-by-layer optimizer in memory: the same bits."""

from __future__ import annotations

import copy
import errno
import functools
import gc
import itertools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_hizoo import OracleHiZOO, read_noise
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BartConfig

from hizoo import HiZOO, Layers
from zeroth_order.blocks import Blocks, blocks_of, placeholder
from zeroth_order.streamed import StreamedLayers, StreamedWeights, best_write_every
from zeroth_order.traffic import BUFFERS, DISK, Block, Traffic

FAMILIES = ("opt", "llama", "qwen2", "gpt_neox", "gemma2", "mixtral")
STATE = "hessian_minus_one"


def streamed(model: nn.Module, folder: Path | None, budget: int = 0, **how: Any) -> nn.Module:
    """Return a model like another one whose blocks are streamed."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = placeholder(parameter, "cpu")

    def read(name: str, target: Tensor) -> int:
        target.copy_(tensors[name])
        return target.nbytes

    blocks = Blocks(twin, read, folder, budget, **how)
    for name, parameter in twin.named_parameters():
        if parameter not in blocks.block_of:
            parameter.data = tensors[name].clone()
    return twin


def trained(
    model: nn.Module, layers: Any, steps: int, accumulated: int, scheduled: bool, **settings: Any
) -> tuple[list[tuple], dict[str, Tensor], HiZOO]:
    """Return losses, g and c of every step, and the weights and h at the end."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = HiZOO(groups, layers=layers, **settings)
    generator, log = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        ids = [torch.randint(5, 400, (2, 9 + i), generator=generator) for i in range(accumulated)]
        batches = [
            (lambda each=each: model(input_ids=each, labels=each).loss, i + 1)
            for i, each in enumerate(ids)
        ]
        if blocks_of(model):
            optimizer.estimate_batches(batches)
            log += optimizer.losses
        else:
            for batch in batches:
                optimizer.estimate(*batch)
                log += optimizer.losses
        optimizer.step()
        log.append([optimizer.projected_gradient, optimizer.curvature])
        if scheduled:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
                group["hessian_smooth"] *= 0.5
                group["weight_decay"] *= 0.5
    optimizer.finish()
    tensors: dict[str, Tensor] = {}
    blocks = blocks_of(model)
    names = {p: name for name, p in model.named_parameters()}
    for parameter in blocks.in_order(names) if blocks else names:
        tensors[names[parameter]] = parameter.detach().clone()
        for kind, state in optimizer.state.get(parameter, {}).items():
            tensors[f"{names[parameter]} {kind}"] = state.clone()
    return log, tensors, optimizer


def differences(expected: tuple, found: tuple) -> list[str]:
    """Return what differs between two results of ``trained``, by name."""
    wrong = [] if expected[0] == found[0] else ["losses, g or c"]
    wrong += [] if expected[1].keys() == found[1].keys() else ["names"]
    return wrong + [n for n, t in expected[1].items() if not torch.equal(t, found[1].get(n, t + 1))]


HESSIANS = {
    "full": {"hessian_smooth": 1e-3},
    "low-rank": {"hessian_smooth": 1e-3, "hessian": "lowrank"},
    "no h": {"hessian_smooth": 0.0},
    "auto": {"hessian_smooth": 0.0, "lr": "auto", "curvature_every": 2},
}


@pytest.mark.parametrize(
    "family",
    [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_every_bit_is_that_of_the_step_in_memory(family: str, tmp_path: Path) -> None:
    wrong = []
    kinds = itertools.product(HESSIANS, (torch.float32, torch.bfloat16))
    for number, (name, dtype) in enumerate(kinds):
        model = tiny_model(family, num_hidden_layers=3).to(dtype)
        settings = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-2} | HESSIANS[name]
        course = {"steps": 5, "accumulated": 1 + number % 2, "scheduled": number % 3 > 0}
        course |= settings | {"num_samples": 1 + (number % 4 == 1)}
        folder, budget = tmp_path if number % 4 else None, (number % 3) * 30_000
        # A GPU's blocks go through buffers on the host.
        how = {"staged": number % 2 == 0, "write_every": 3 if number % 4 in (1, 2) else 1}
        twin = streamed(model, folder, budget, **how)
        found = trained(twin, StreamedLayers(twin), **course)
        expected = trained(model, Layers(model), **course)
        wrong += [(name, dtype, each) for each in differences(expected, found)]
    assert not wrong
    gc.collect()  # pools of threads end with their models
    assert threading.active_count() < 100


@pytest.mark.parametrize("kind", ["full", "low-rank", "no h"])
def test_streamed_steps_follow_the_oracle(kind: str, tmp_path: Path) -> None:
    model = tiny_model("opt", num_hidden_layers=2).double()
    names = [name for name, _ in model.named_parameters()]
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(5, 50, (2, 6), generator=generator) for _ in range(2)]

    def loss_of(model: Any, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def of_parameters(ids: Tensor, parameters: list[Tensor]) -> float:
        weights = dict(zip(names, parameters, strict=True))
        with torch.no_grad():
            call = functools.partial(torch.func.functional_call, model, weights, ())
            return float(loss_of(lambda **inputs: call(inputs), ids))

    smooth = HESSIANS[kind]["hessian_smooth"]
    count = len(names)
    rates, decays = [1e-2] * count, [0.1] * count
    oracle = OracleHiZOO([*model.parameters()], 1e-3, smooth, rates, decays, kind == "low-rank")
    twin = streamed(model, tmp_path, write_every=2)
    settings = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "num_samples": 2}
    optimizer = HiZOO(twin.parameters(), layers=StreamedLayers(twin), **settings | HESSIANS[kind])
    for _ in range(5):
        noise = [read_noise(optimizer, direction) for direction in range(2)]
        oracle.step([functools.partial(of_parameters, ids) for ids in batches], noise)
        optimizer.estimate_batches(
            [(functools.partial(loss_of, twin, ids), 1.0) for ids in batches]
        )
        optimizer.step()
    before = [parameter.detach() for parameter in model.parameters()]
    changes = zip(before, oracle.parameters, strict=True)
    moved = max(float((old - new).abs().max()) for old, new in changes)
    weights = blocks_of(twin).in_order(twin.parameters())
    pairs = zip(weights, oracle.parameters, strict=True)
    difference = max(float((found.detach() - right).abs().max()) for found, right in pairs)
    assert difference < 1e-6 * moved
    assert moved > 1e-3
    if smooth:
        assert max(float((h - 1).abs().max()) for h in oracle.hessians) > 1e-3


def moved(blocks: Blocks) -> tuple[int, int]:
    """Bytes that were read and written so far, once nothing is on its way."""
    for block in blocks.blocks:
        for future in (block.reading, block.writing):
            if future is not None:
                future.result()
    return blocks.traffic.bytes_read, blocks.traffic.bytes_written


def test_a_step_reads_and_writes_every_block_once(tmp_path: Path) -> None:
    for kind, settings in HESSIANS.items():
        twin = streamed(tiny_model("opt", num_hidden_layers=4), tmp_path)
        blocks, layers = blocks_of(twin), StreamedLayers(twin)
        optimizer = HiZOO(twin.parameters(), layers=layers, num_samples=3, **settings)
        ids, counts = torch.randint(5, 400, (2, 9)), []

        def loss(twin: nn.Module = twin, ids: Tensor = ids) -> Tensor:
            return twin(input_ids=ids, labels=ids).loss

        for _ in range(4):
            optimizer.estimate_batches([(loss, 1.0), (loss, 2.0)])
            optimizer.step()
            counts.append(moved(blocks))
        assert counts[0][1] == 0, kind  # the first update is applied as its block comes by again
        size = sum(block.region.size for block in blocks.blocks)
        weights = sum(p.nbytes for block in blocks.blocks for p in block.names)
        assert size < (2 if kind == "full" else 1) * weights + 4 * (4096 + 64 * 32), kind
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(counts)]
        assert steps[1:] == [(size, size)] * 2, kind


def test_the_working_file_has_places_for_blocks_on_disk_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the system has no way to reserve disk space."""
    blocks = blocks_of(streamed(tiny_model("opt", num_hidden_layers=4), tmp_path, 40_000))
    far = [block.region for block in blocks.blocks if block.home == DISK]
    kept, size = len(blocks.blocks) - len(far), sum(region.size for region in far)
    assert kept and far and blocks.traffic.size_on_disk(blocks.blocks) == size
    assert [region.start for region in far] == [region.size * n for n, region in enumerate(far)]

    def refuse(number: int, *_: int) -> None:
        raise OSError(number, "no fallocate")

    for number in (errno.EINVAL, errno.EOPNOTSUPP, None):
        if number:
            monkeypatch.setattr(os, "posix_fallocate", functools.partial(refuse, number))
        else:  # macOS
            monkeypatch.delattr(os, "posix_fallocate")
        blocks.traffic.file = None
        blocks.traffic.reserve(blocks.blocks)
        assert os.fstat(blocks.traffic.file.descriptor).st_size == size


def test_blocks_are_written_less_often_where_the_disk_is_the_limit(tmp_path: Path) -> None:
    twin = streamed(tiny_model("opt", num_hidden_layers=4), tmp_path, write_every=3)
    blocks, layers = blocks_of(twin), StreamedLayers(twin)
    optimizer = HiZOO(twin.parameters(), layers=layers, hessian_smooth=1e-3)
    ids = torch.randint(5, 400, (2, 9))
    for _ in range(8):
        optimizer.step(lambda: twin(input_ids=ids, labels=ids).loss)
    size = sum(block.region.size for block in blocks.blocks)
    written = moved(blocks)[1]
    assert 2 * size <= written < 3 * size  # seven updates were applied to every block
    optimizer.finish()
    assert moved(blocks)[1] == written + size
    seconds = {"reading": 6.0, "writing": 6.0, "waiting": 9.0}
    for updating, every in ((0.01, 16), (1.0, 8), (3.0, 4)):
        assert best_write_every(12.0, seconds | {"updating": updating}) == every
    assert best_write_every(12.0, seconds | {"updating": 0.01, "waiting": 1.0}) == 1


def test_weights_within_blocks_that_nothing_reads_are_named(tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "d_model": 16, "decoder_layers": 2, "decoder_ffn_dim": 16}
    heads = {"encoder_layers": 2, "decoder_attention_heads": 2, "encoder_attention_heads": 2}
    bart = AutoModelForCausalLM.from_config(BartConfig(**shape, **heads, is_decoder=True)).eval()
    ids = torch.tensor([[1, 5, 9, 4]])

    def unused(model: nn.Module, kind: type[Layers]) -> list[str]:
        with torch.no_grad():
            return kind(model).check(lambda: model(input_ids=ids, labels=ids).loss)

    expected = unused(bart, Layers)
    assert expected and all("encoder_attn" in name for name in expected)
    assert unused(streamed(bart, tmp_path), StreamedLayers) == expected
    # Some of its modules do not run, and others read their weights.
    assert unused(streamed(tiny_model("lfm2"), tmp_path), StreamedLayers) == []


def test_wrong_updates_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, write = StreamedWeights.arrived, Traffic.begin_to_write

    def with_present_rate(self: StreamedWeights, *args: Any) -> bool:
        self.waiting = [
            update._replace(
                of_groups={
                    key: step._replace(learning_rate=self.param_groups[0]["lr"])
                    for key, step in update.of_groups.items()
                }
            )
            for update in self.waiting
        ]
        return arrived(self, *args)

    def without_one_block(self: StreamedWeights, block: Block, tensors: Any) -> bool:
        if block.number == 1 and self.waiting:
            self._next[block] += 1
        return arrived(self, block, tensors)

    def without_one_write(self: Traffic, block: Block) -> None:
        if block.number != 1:
            write(self, block)

    model = tiny_model("llama", num_hidden_layers=3)
    course = {"steps": 3, "accumulated": 1, "scheduled": True, "hessian_smooth": 1e-3, "lr": 1e-2}
    expected = trained(twin := copy.deepcopy(model), Layers(twin), **course)
    mutants = [
        (StreamedWeights, "arrived", with_present_rate),
        (StreamedWeights, "arrived", without_one_block),
        (Traffic, "begin_to_write", without_one_write),
        (Traffic, "begin_to_write", write),
    ]
    found = []
    for kind, name, mutant in mutants:
        monkeypatch.setattr(kind, name, mutant)
        twin = streamed(model, tmp_path)
        found.append(bool(differences(expected, trained(twin, StreamedLayers(twin), **course))))
        monkeypatch.undo()
    assert found == [True, True, True, False]


def test_what_fails_within_a_pass_is_raised_and_the_next_step_is_right(tmp_path: Path) -> None:
    model = tiny_model("opt", num_hidden_layers=3)
    twin = streamed(model, tmp_path)
    ids = torch.randint(5, 400, (2, 9))
    found = []
    for each, layers in ((model, Layers(model)), (twin, StreamedLayers(twin))):
        optimizer = HiZOO(each.parameters(), layers=layers, lr=1e-3, hessian_smooth=1e-3)
        calls = itertools.count()

        def loss(each: nn.Module = each, calls: Any = calls) -> Tensor:
            value = each(input_ids=ids, labels=ids).loss
            if next(calls) == 8:
                raise KeyError("a reward")
            return value

        for _ in range(4):
            try:
                found.append(optimizer.step(loss))
            except KeyError as error:
                found.append(str(error))
    assert found[:4] == found[4:]
    assert found.count("'a reward'") == 2
    assert all(parameter.isnan().all() for parameter in blocks_of(twin).block_of)


@pytest.mark.parametrize("place", ["update", "own pass", "read", "loop over weights"])
def test_steps_after_ctrl_c_are_right(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("opt", num_hidden_layers=4)
    twin = streamed(model, tmp_path)
    ids, blocks, found, held = torch.randint(5, 400, (2, 9)), blocks_of(twin), [], None
    apply, fill, main_thread = StreamedWeights.apply, Traffic._fill, threading.main_thread().ident

    def interrupted_update(self: StreamedWeights, *args: Any) -> None:
        apply(self, *args)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    def interrupted_read(self: Traffic, *args: Any) -> None:
        monkeypatch.undo()
        time.sleep(0.3)  # until the main thread waits for it
        signal.pthread_kill(main_thread, signal.SIGINT)
        fill(self, *args)

    def interrupted_pass(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    for each, layers in ((model, Layers(model)), (twin, StreamedLayers(twin))):
        optimizer = HiZOO(each.parameters(), layers=layers, lr=1e-3, hessian_smooth=1e-3)

        def loss(each: nn.Module = each) -> Tensor:
            return each(input_ids=ids, labels=ids).loss

        found += [optimizer.step(loss) for _ in range(2)]
        if each is twin and place == "loop over weights":
            held = blocks.in_order(twin.parameters())  # as a traceback in a notebook holds it
            assert next(weight for weight in held if weight in blocks.block_of) is not None
        elif each is twin and place == "own pass":
            norm = blocks.blocks[1].module.final_layer_norm
            with norm.register_forward_hook(interrupted_pass), pytest.raises(KeyboardInterrupt):
                loss()
        elif each is twin:
            if place == "update":
                monkeypatch.setattr(StreamedWeights, "apply", interrupted_update)
            else:
                monkeypatch.setattr(Traffic, "_fill", interrupted_read)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(loss)
        found += [optimizer.step(loss) for _ in range(2)]
    assert found[:4] == found[4:]
    del held
    moved(blocks)
    blocks.traffic._writer.submit(int).result()  # what it has written is free
    ahead = [block for block in blocks.blocks if block.reading is not None]
    assert blocks.traffic._free.qsize() + len(ahead) == BUFFERS


def test_memory_that_a_gpu_copies_from_is_unregistered_when_it_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its addresses may be given out again with other pages behind them."""
    calls: list[tuple[str, int]] = []

    class Cuda:
        def cudaHostRegister(self, start: int, size: int, flags: int) -> None:
            calls.append(("register", start))

        def cudaHostUnregister(self, start: int) -> None:
            calls.append(("unregister", start))

    monkeypatch.setattr(torch.cuda, "cudart", Cuda)
    traffic = Traffic(torch.device("cpu"), lambda *_: 0, None)
    traffic.is_gpu = True
    memory = traffic._on_host(4096)
    start = memory.data_ptr()
    del memory
    assert calls == [("register", start), ("unregister", start)]
