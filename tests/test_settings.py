"""Names of runs: what distinguishes two results, and what does not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import MODEL, SAMPLES, command

from command_line.arguments import Arguments, check, parse_arguments
from command_line.contradictions import WEIGHTS
from command_line.settings import (
    NOT_OF_THE_RESULT,
    broadcast_rate,
    default_name,
    name_run,
    settle_dtype,
)


def tag(**arguments: Any) -> str:
    return named(parse_arguments(command(**arguments))).name


def named(arguments: Arguments) -> Arguments:
    name_run(arguments)
    return arguments


def hash_of(name: str) -> str:
    return name.rpartition("-")[2]


TRAINED = {"trainer": "zo", "num_train": 12, "max_steps": 6, "num_dev": 4}
BEST = {**TRAINED, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
EVALUATIONS = (
    *({}, {"num_eval": 7}, {"load_bfloat16": True}, {"max_length": 99}, {"num_train": 3}),
    *({"train_set_seed": 1}, {"task": "CB"}, {"task": "SQuAD"}, {"data_dir": None}),
    *({"num_train": 3, "sfc": True}, {"num_train": 3, "num_train_sets": 2}),
    *({"task": "SQuAD", "max_new_tokens": 5}, {"model_name": "facebook/opt-125m"}),
)
TRAININGS = (
    *({}, {"learning_rate": 1e-2}, {"hessian": "lowrank"}, {"zo_num_samples": 2}),
    *({"zo_perturbation": "layerwise"}, {"weight_decay": 0.1}, {"data_seed": 3}),
    *({"lr_scheduler_type": "linear"}, {"warmup_steps": 2}, {"gradient_accumulation_steps": 2}),
    *({"num_dev": 9}, {"eval_before_training": True}, {"lora": True}, {"prefix_tuning": True}),
    *({"lora": True, "lora_alpha": 3}, {"head_tuning": True}, {"train_as_classification": True}),
    *({"non_diff": True}, {"trainer": "regular"}, {"trainer": "regular", "adam_beta1": 0.5}),
    {"trainer": "regular", "linear_probing": True},
    *({"trainer": "broadcast"} | more for more in ({}, {"broadcast_matrices": "o"})),
    *({"trainer": "broadcast", f"broadcast_{name}": 0.3} for name in ("rate", "damping", "from")),
    {"trainer": "broadcast", "broadcast_tokens": 9},
)
BEST_CHECKPOINTS = ({"save_steps": 2}, {"save_steps": 4}, {"save_steps": 2, "eval_steps": 1})


def test_every_setting_that_changes_the_result_changes_the_name() -> None:
    tags = [tag(**arguments) for arguments in EVALUATIONS]
    hizoo = TRAINED | {"hessian_smooth_type": "constant1e-8"}
    tags += [tag(**hizoo | arguments) for arguments in TRAININGS]
    tags += [tag(**BEST | arguments) for arguments in BEST_CHECKPOINTS]
    hashes = {name: hash_of(name) for name in tags}
    assert len(tags) == len(set(hashes.values())) == len({*tags})


def test_what_does_not_change_the_result_leaves_the_name(tmp_path: Path) -> None:
    same = (
        *({}, {"save_steps": 2}, {"logging_steps": 3}, {"per_device_eval_batch_size": 2}),
        *({"output_dir": tmp_path}, {"result_file": "x.json"}, {"overwrite_output_dir": True}),
        *({"verbose": True}, {"save_on_interrupt": False}, {"task": "sst2"}, {"hessian": "full"}),
        *({"disable_tqdm": "True"}, {"model_name": f"{MODEL}/../tiny-opt/"}),
    )
    assert len({tag(**TRAINED | arguments) for arguments in same}) == 1


def test_what_is_left_out_of_the_hash_are_arguments() -> None:
    names = {field.name for field in dataclasses.fields(Arguments)}
    assert names >= NOT_OF_THE_RESULT


def test_readable_part_and_length() -> None:
    assert tag().startswith("SST2-tiny-opt-none-0-shot-seed42-")
    name = tag(**TRAINED, learning_rate=1e-4, hessian_smooth_type="constant1e-5", seed=3)
    assert name.startswith("SST2-tiny-opt-zo-ft-lr0.0001-seed3-steps6-")
    assert "-zo-head-lr" in tag(**TRAINED, head_tuning=True)
    assert "-zo-prefix-lr" in tag(**TRAINED, prefix_tuning=True)
    name = tag(**TRAINED | {"trainer": "broadcast"}, broadcast_rate=0.5)
    assert name.startswith("SST2-tiny-opt-broadcast-ft-lr0.5-seed42-steps6-")
    longer = tag(**TRAINED | {"max_steps": 9}, learning_rate=1e-4, seed=3)
    epochs = tag(**TRAINED | {"max_steps": -1}, num_train_epochs=2)
    assert "-steps9-" in longer and "-epochs2-" in epochs


def test_a_longer_run_is_the_same_experiment() -> None:
    short, long = tag(**TRAINED), tag(**TRAINED | {"max_steps": 9})
    assert short != long and hash_of(short) == hash_of(long)


def test_models_and_data_count_by_their_content(tmp_path: Path) -> None:
    first, second = tmp_path / "one/checkpoint-400", tmp_path / "two/checkpoint-400"
    for folder in (first, second):
        shutil.copytree(MODEL, folder)
    names = [tag(model_name=folder) for folder in (first, second)]
    assert "-one-checkpoint-400-" in names[0] and "-two-checkpoint-400-" in names[1]
    assert hash_of(names[0]) == hash_of(names[1]) == hash_of(tag())
    weights = bytearray((second / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (second / "model.safetensors").write_bytes(weights)
    assert hash_of(tag(model_name=second)) != hash_of(names[0])
    shutil.copytree(SAMPLES / "sst2", tmp_path / "data" / "SST2")
    elsewhere = tag(data_dir=tmp_path / "data")
    assert elsewhere == tag()
    with (tmp_path / "data/SST2/train.jsonl").open("a") as file:
        file.write(json.dumps({"sentence": "one more", "label": 1, "idx": 9999}) + "\n")
    assert tag(data_dir=tmp_path / "data") != elsewhere


def test_own_files_count_by_their_content(tmp_path: Path) -> None:
    names = []
    for answer in ("yes", "no"):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"prompt": "Well?", "answer": answer}) + "\n")
        own = {"task_name": None, "data_dir": None, "validation_file": file}
        names.append(tag(**own, max_new_tokens=4))
    assert names[0].startswith(f"{tmp_path.name}"[:40]) and hash_of(names[0]) != hash_of(names[1])


def test_given_names() -> None:
    """A tag stands behind task and model, as in MeZO; an empty one is none."""
    for given, name, folder in (
        ({"tag": "mine"}, "SST2-tiny-opt-mine", "result/SST2-tiny-opt-mine"),
        ({"tag": "", "output_dir": "", "config": "", "resume_from_checkpoint": ""}, None, None),
        ({"output_dir": "mine"}, None, "mine"),
        ({"tag": "a", "output_dir": "mine"}, "SST2-tiny-opt-a", "mine"),
    ):
        arguments = named(parse_arguments(command(**TRAINED, **given)))
        name = name or default_name(arguments)
        assert arguments.output_dir == (folder or f"result/{name}")
        assert str(arguments.result_path) == f"result/{name}.json"


def test_long_names_fit_the_file_system(tmp_path: Path) -> None:
    """Of letters of several bytes too."""
    for letter in ("m", "模"):
        model = tmp_path / (letter * 80)
        shutil.copytree(MODEL, model)
        assert len(tag(**TRAINED, model_name=model).encode()) < 160


def test_saved_dtype_is_that_of_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run is called as with the flag."""
    failures = {}
    for saved, gpu_has_bfloat16, expected in (
        *(("float16", False, {"load_float16"}), ("bfloat16", True, {"load_bfloat16"})),
        ("bfloat16", False, set()),  # float16 would overflow
        *(("float32", True, set()), (None, True, set())),
    ):
        config = json.loads((MODEL / "config.json").read_text()) | {"dtype": saved}
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda emulated, it_has=gpu_has_bfloat16: it_has
        )
        plain = command(model_name=tmp_path)
        arguments = parse_arguments([*plain, "--load_saved_dtype"])
        check(arguments)
        on_cpu = dataclasses.replace(arguments)
        settle_dtype(on_cpu)
        assert not (on_cpu.load_float16 or on_cpu.load_bfloat16 or on_cpu.load_saved_dtype)
        arguments.use_cpu = False  # as where there is a GPU
        settle_dtype(arguments)
        found = {name for name in WEIGHTS if getattr(arguments, name)}
        flagged = parse_arguments([*plain, *(f"--{name}" for name in expected)])
        if found != expected or named(arguments).name != named(flagged).name:
            failures[saved, gpu_has_bfloat16] = found
    assert not failures


@pytest.mark.parametrize(
    ("length", "rate"),
    [
        ({"max_steps": 20}, 4),
        ({"max_steps": 50}, 4),
        ({"max_steps": 100}, 2),
        ({"max_steps": 1000}, 0.2),
        ({"max_steps": 100, "broadcast_rate": 0.5}, 0.5),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 2}, 2),
    ],
)
def test_rate_of_error_broadcast_sums_up_to_100(length: dict[str, Any], rate: float) -> None:
    arguments = parse_arguments(command(trainer="broadcast", num_train=1000, **length))
    # Of 1,000 that were asked for, 100 are there.
    assert broadcast_rate(arguments, 100) == pytest.approx(rate)
