"""Runs whose weights are streamed: the bits of a run in memory, whatever kills them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, command, finish, small_model, training, weights
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoConfig, OPTPreTrainedModel, TrainingArguments

import run
from hizoo import HiZOO, Layers
from language_model.loading import load_model
from language_model.streaming import Offload, load_if_streamed_or_renamed
from training.journal import JOURNAL
from utils import InputError
from zeroth_order.blocks import blocks_of
from zeroth_order.streamed import StreamedLayers

DISK = {"offload": "disk"}
IN_MEMORY = {"zo_perturbation": "layerwise"}


def rows(folder: Path) -> list[str]:
    """The journal's rows; a run that was longer afterwards has a checksum on the way beside."""
    *lines, last = (folder / "out" / JOURNAL).read_text().splitlines()[1:]
    assert '"kind": "checksum"' in last
    return [*(line for line in lines if '"kind": "checksum"' not in line), last]


def assert_same(first: Path, second: Path, checkpoint: str = "checkpoint-6") -> None:
    """Losses, g, c and η of every step, and the weights at the end, are the same bits."""
    assert rows(first) == rows(second)
    found, expected = (weights(folder / "out" / checkpoint) for folder in (first, second))
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


KINDS: dict[str, dict[str, Any]] = {
    "HiZOO": {"eval_strategy": "steps", "num_dev": 4, "eval_steps": 2},
    "HiZOO-L in bfloat16": {
        **{"hessian": "lowrank", "load_bfloat16": True, "zo_num_samples": 2},
        **{"gradient_accumulation_steps": 2, "weight_decay": 0.1, "num_train": 16},
        **{"lr_scheduler_type": "linear", "hessian_smooth_type": "constant1e-2"},
    },
    "MeZO, kept blocks": {"hessian_smooth_type": "constant0", "offload_memory": "30KB"},
    "F1 of texts": {
        **{"task": "SQuAD", "non_diff": True, "train_as_classification": None},
        **{"max_new_tokens": 4, "max_steps": 3, "save_steps": 3, "num_train": 4},
    },
}


def test_a_streamed_run_is_that_in_memory(tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        folders = [tmp_path / name / place for place in ("memory", "disk")]
        for folder, place in zip(folders, (IN_MEMORY, DISK), strict=True):
            in_memory = {"offload_memory": None} if place is IN_MEMORY else {}
            finish(training(folder, **(kind | place | in_memory)))
        assert_same(*folders, f"checkpoint-{kind.get('max_steps', 6)}")


def test_adapters_are_trained_on_a_base_that_is_only_read(tmp_path: Path) -> None:
    for kind in ({"lora": True}, {"prefix_tuning": True, "zo_eps": 0.1}, {"head_tuning": True}):
        folders = [tmp_path / next(iter(kind)) / place for place in ("memory", "cpu")]
        settings = {"save_strategy": "no", **kind}
        finish(training(folders[0], **IN_MEMORY, **settings))
        finish(training(folders[1], offload="cpu", **settings))
        assert rows(folders[0]) == rows(folders[1]), kind


def test_evaluation_reads_what_was_trained(tmp_path: Path) -> None:
    settings = {"no_eval": None, "num_eval": 6, "save_model": True, "save_strategy": "no"}
    settings |= {"num_dev": 4, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"load_best_model_at_end": True, "learning_rate": 1e-2}
    found = []
    for place in (IN_MEMORY, DISK):
        folder = tmp_path / next(iter(place))
        finish(training(folder, predictions_file=folder / "rows.jsonl", **settings, **place))
        of_saved = {
            "result_file": folder / "again.json",
            "predictions_file": folder / "again.jsonl",
        }
        offload = {"offload": place.get("offload")}
        finish(command(model_name=folder / "out", num_train=4, **of_saved, **offload))
        files = (folder / name for name in ("rows.jsonl", "again.jsonl"))
        found.append((*(file.read_text() for file in files), weights(folder / "out")))
    (trained, shown, first), (streamed, streamed_shown, second) = found
    assert trained == streamed
    assert shown == streamed_shown
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_a_run_resumes_in_memory_or_streamed(tmp_path: Path) -> None:
    finish(training(tmp_path / "whole", **IN_MEMORY))
    for first, second in ((DISK, IN_MEMORY), (IN_MEMORY, DISK)):
        folder = tmp_path / next(iter(first))
        finish(training(folder, max_steps=3, **first))
        finish(training(folder, **second))
        assert_same(tmp_path / "whole", folder)


# Starts runs that end with SIGKILL as they load some block, and again without it.
DRIVER = """
import json, os, signal, sys
import run, trainer
from zeroth_order.blocks import Blocks

load, loads = Blocks.load, 0

def start(argv, last):
    child = os.fork()
    if child == 0:
        def count(self, block):
            global loads
            load(self, block)
            loads += 1
            if loads == last:
                os.kill(os.getpid(), signal.SIGKILL)
        Blocks.load = count
        os._exit(run.main(argv))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for argv, last in json.loads(sys.argv[1]):
    print("ended:", start(argv, last), start(argv, None))
"""


@pytest.mark.parametrize(
    "loads",
    [(12, 19), pytest.param((1, 15, 16, 17, 22, 23), marks=pytest.mark.slow)],
    ids=["two", "others"],
)
def test_a_kill_at_any_block_costs_no_step(tmp_path: Path, loads: tuple[int, ...]) -> None:
    settings = {"max_steps": 4, "save_steps": 2, **DISK}
    finish(training(tmp_path / "whole", **settings))
    # Two blocks: a step loads both, and before the first one they are loaded some times more.
    lines = [(training(tmp_path / f"{n}", **settings), n) for n in loads]
    (tmp_path / "driver.py").write_text(DRIVER)
    printed = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), json.dumps(lines)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in printed.stdout.splitlines() if line.startswith("ended")] == [
        "ended: -9 0"
    ] * len(lines)
    for _, number in lines:
        assert_same(tmp_path / "whole", tmp_path / f"{number}", "checkpoint-4")
        left = [path.name for path in (tmp_path / f"{number}" / "out").iterdir()]
        assert not [name for name in left if "blocks" in name]


# Of a family: what it is stored as, in which dtype, and how large a file may be.
STORED = {
    "opt": ("bfloat16", "20KB"),
    "llama": ("float16", "5GB"),
    "gpt_neox": ("float32", "20KB"),
    "gemma2": ("float32", "5GB"),
    "mixtral": ("bfloat16", "20KB"),
}


def test_files_of_a_model_are_read_and_written_as_transformers_does(tmp_path: Path) -> None:
    offload = Offload(tmp_path, 0, torch.device("cpu"))
    ids = torch.randint(5, 400, (2, 9))
    for family, (dtype, size) in STORED.items():
        stored = tmp_path / family
        tiny_model(family).to(getattr(torch, dtype)).save_pretrained(stored, max_shard_size=size)
        assert (stored / "model.safetensors").is_file() == (size == "5GB")
        found = []
        for place in (None, offload):
            model = load_model(str(stored), torch.float32, offload=place)
            layers = StreamedLayers(model) if place else Layers(model)
            optimizer = HiZOO(model.parameters(), layers=layers, lr=1e-2, hessian_smooth=1e-2)
            for _ in range(2):
                optimizer.step(lambda model=model: model(input_ids=ids, labels=ids).loss)
            optimizer.finish()
            folder = tmp_path / f"{family} of {place}"
            model.save_pretrained(folder)
            saved = load_model(str(folder), torch.float32).state_dict()
            found.append((optimizer.losses, saved))
        (losses, expected), (streamed, weights) = found
        assert losses == streamed, family
        assert expected.keys() == weights.keys(), family
        assert not [n for n, t in expected.items() if not torch.equal(t, weights[n])], family
        first = load_model(str(stored), torch.float32).state_dict()
        assert [n for n, t in expected.items() if not torch.equal(t, first[n])], family


# A family and the dtype it is loaded in.
IN_HALF_PRECISION = {
    "rotary positions of GPT-J": ("gptj", torch.bfloat16),
    "norms in float32": ("gpt_oss", torch.float16),
    "a router's bias in float32": ("deepseek_v3", torch.bfloat16),
}


def test_a_model_in_half_precision_is_that_of_transformers(tmp_path: Path) -> None:
    ids = torch.randint(5, 400, (2, 40))
    for name, (family, dtype) in IN_HALF_PRECISION.items():
        tiny_model(family).save_pretrained(tmp_path / family)
        assert_loaded_alike(str(tmp_path / family), dtype, ids, name)


def assert_loaded_alike(folder: str, dtype: torch.dtype, ids: torch.Tensor, name: str) -> None:
    """A streamed model has the weights, buffers and logits of the one in memory."""
    model = load_model(folder, dtype)
    streamed = load_model(folder, dtype, offload=Offload(None, 0, torch.device("cpu")))
    expected = dict([*model.named_parameters(), *model.named_buffers()])
    tensors = dict([*streamed.named_parameters(), *streamed.named_buffers()])
    assert expected.keys() == tensors.keys(), name
    for key, tensor in zip(tensors, blocks_of(streamed).in_order(tensors.values()), strict=True):
        assert tensor.dtype == expected[key].dtype, (name, key)
        assert torch.equal(tensor, expected[key]), (name, key)
    assert torch.equal(streamed(input_ids=ids).logits, model(input_ids=ids).logits), name


def test_a_head_with_values_of_its_own_is_not_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids, own = torch.randint(5, 400, (2, 9)), tmp_path / "own"
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(own)
    tensors = load_file(own / "model.safetensors")
    for name, head in (("own", "lm_head"), ("same", "model.embed_tokens")):
        folder = tmp_path / name
        config = AutoConfig.from_pretrained(own)
        config.tie_word_embeddings = True
        config.save_pretrained(folder)
        both = tensors | {"lm_head.weight": tensors[f"{head}.weight"].clone()}
        save_file(both, folder / "model.safetensors", {"format": "pt"})
        caplog.clear()
        assert_loaded_alike(str(folder), torch.float32, ids, name)
        assert ("they are not tied" in caplog.text) == (name == "own")
        # A checkpoint holds the head, if it is not tied.
        model = load_model(str(folder), torch.float32, offload=Offload(None, 0, ids.device))
        model.save_pretrained(tmp_path / "saved")
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        assert ("lm_head.weight" in saved) == (name == "own")
        assert_loaded_alike(str(tmp_path / "saved"), torch.float32, ids, f"{name}, saved")


def test_files_are_closed_with_their_model(tmp_path: Path) -> None:
    def open_shards() -> int:
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(str(tmp_path) in os.readlink(link) for link in links if os.path.lexists(link))

    tiny_model("opt").save_pretrained(tmp_path, max_shard_size="40KB")
    for _ in range(2):
        model = load_model(
            str(tmp_path), torch.float32, offload=Offload(None, 0, torch.device("cpu"))
        )
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
        assert open_shards() > 2
        # Checkpoint after checkpoint, as by --load_best_model_at_end.
        opened = open_shards()
        for _ in range(2):
            load_if_streamed_or_renamed(model, tmp_path)
            assert open_shards() == opened
        del model
        gc.collect()
        assert open_shards() == 0


def test_files_that_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    model, place = tiny_model("opt"), Offload(None, 0, torch.device("cpu"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="reads safetensors files, and there are none; save the"):
        load_model(str(tmp_path), torch.float32, offload=place)
    # Integers of another scale, which would be read as they are.
    model.save_pretrained(tmp_path)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its weights are quantised"):
        load_model(str(tmp_path), torch.float32, offload=place)


REFUSED = {
    "--trainer regular and broadcast need all weights in memory": {"trainer": "regular"},
    "--zo_perturbation inplace": {"zo_perturbation": "inplace"},
    "--offload_memory: `size` much is not in a valid format": {"offload_memory": "much"},
    "--merge_adapter needs all weights": {"merge_adapter": True, "lora": True, "save_model": True},
}


def test_what_cannot_be_streamed_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for message, arguments in REFUSED.items():
        settings = {"offload": "disk"} | arguments
        assert run.main(training(tmp_path, **settings)) == 2, message
        assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_and_disks_that_do_not_fit_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [*training(tmp_path, **DISK), "--dry_run"]
    assert run.main(plan) == 0
    assert "2 blocks, the largest 0 MiB; a step reads 0 MiB" in capfd.readouterr().out
    prefix = training(tmp_path, prefix_tuning=True, **DISK)
    assert run.main([*prefix, "--dry_run"]) == 0
    assert "a step reads 0 MiB and writes 0 MiB; 0 MiB in memory" in capfd.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(OPTPreTrainedModel, "_no_split_modules", [])
        for argv in (plan, training(tmp_path, **DISK)):
            assert run.main(argv) == 2
            assert "--offload: OPTForCausalLM names no blocks" in capfd.readouterr().err
    monkeypatch.setattr("zeroth_order.block_file.free_bytes", lambda folder: 1000)
    for settings in ({}, {"zo_eps": "auto"}):
        assert run.main(training(tmp_path, **DISK, **settings)) == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("error: --offload disk: ") and "give another --offload_dir" in line
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_processes_do_not_stream_and_generate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes would exchange their losses in the order of their texts' lengths."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert run.main(training(tmp_path, **KINDS["F1 of texts"], **DISK)) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --offload: the losses of generated texts need"), line


# A model of 80 MiB and its h: 160 MiB, of which 1/8 may be in memory.
PEAK = """
import sys
import torch
from pathlib import Path
from hizoo import HiZOO
from language_model.loading import load_model
from language_model.streaming import Offload
from zeroth_order.streamed import StreamedLayers

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))

folder = sys.argv[1]
small = load_model(sys.argv[2], torch.float32)  # loads the libraries
small(input_ids=torch.ones(1, 4, dtype=torch.long))
before = peak()
offload = Offload(Path(folder), 20 << 20, torch.device("cpu"))
model = load_model(folder, torch.float32, offload=offload)
settings = {"hessian_smooth": 1e-6, "compile": False}
optimizer = HiZOO(model.parameters(), layers=StreamedLayers(model), **settings)
ids = torch.randint(5, 400, (4, 16))
for _ in range(3):
    optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_few_blocks(tmp_path: Path) -> None:
    tiny_model(
        "opt", num_hidden_layers=26, hidden_size=256, ffn_dim=1024, word_embed_proj_dim=256
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "peak.py").write_text(PEAK)
    arguments = [str(tmp_path / "model"), small_model().name]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "peak.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    # Kept blocks 20, four buffers 24, and less than 60 for the weights outside and the passes.
    assert int(done.stdout) < 104
