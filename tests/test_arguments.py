"""The command line: aliases, help, and every kind of bad input in one line with exit code 2."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running import MODEL, SAMPLES, command, contents, finish, training
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import run
from command_line.arguments import Arguments, parse_arguments

REGULAR = {"trainer": "regular"}
# Arguments added to a training run that is in order, and what the line has to say.
BAD_TRAINING = {
    "unknown task": ({"task_name": "SST3"}, ["SST3", "SST2, RTE, CB"]),
    "unknown data directory": ({"data_dir": "nowhere"}, ["--data_dir nowhere"]),
    "unknown model": ({"model_name": "nobody/nothing"}, ["--model_name nobody/nothing"]),
    "unknown local model": ({"model_name": "./no/such"}, ["--model_name ./no/such"]),
    "too many dev examples": ({"num_dev": 1600}, ["1600", "--num_dev"]),
    "too long": ({"max_length": 1025}, ["--max_length 1025", "1024"]),
    "too short": ({"max_length": 1}, ["--max_length 1"]),
    "no training examples": ({"num_train": 0}, ["--num_train 0"]),
    "smoothing": (
        {"hessian_smooth_type": "exp1e-8"},
        ["exp1e-8", "constant<number>, linear<number>, cosine<number>"],
    ),
    "smoothing of 1": ({"hessian_smooth_type": "constant1"}, ["constant1"]),
    "both dtypes": (
        {"load_float16": True, "load_bfloat16": True},
        ["--load_float16 and --load_bfloat16", "give one"],
    ),
    "8 bit training": ({"load_int8": True}, ["--load_int8"]),
    "zo_eps 0": ({"zo_eps": 0}, ["--zo_eps 0"]),
    "zo_eps nan": ({"zo_eps": "nan"}, ["--zo_eps nan"]),
    "zo_eps inf": ({"zo_eps": "inf"}, ["--zo_eps inf"]),
    "negative learning rate": ({"learning_rate": -1}, ["--learning_rate -1"]),
    "learning rate nan": ({"learning_rate": "nan"}, ["--learning_rate nan"]),
    "negative weight decay": ({"weight_decay": -1}, ["--weight_decay -1"]),
    "negative num_train": ({"num_train": -1}, ["--num_train -1"]),
    "negative num_dev": ({"num_dev": -1}, ["--num_dev -1"]),
    "num_eval 0": ({"num_eval": 0}, ["--num_eval 0"]),
    "negative decay_step": ({"decay_step": -1}, ["--decay_step -1"]),
    "negative warmup": ({"warmup_step": -1}, ["--warmup_steps -1"]),
    "negative seed": ({"seed": -1}, ["--seed -1"]),
    "best F1 of options": (
        {
            **{"metric_for_best_model": "f1", "load_best_model_at_end": True, "num_dev": 4},
            **{"eval_strategy": "steps", "eval_steps": 3},
        },
        ["--metric_for_best_model f1", "of SST2, accuracy"],
    ),
    "the lowest accuracy": (
        {
            **{"metric_for_best_model": "accuracy", "load_best_model_at_end": True, "num_dev": 4},
            **{"eval_strategy": "steps", "eval_steps": 3, "greater_is_better": "False"},
        },
        ["--greater_is_better", "accuracy is the highest"],
    ),
    "a falling accuracy": (
        {
            **{"metric_for_best_model": "accuracy", "lr_scheduler_type": "reduce_lr_on_plateau"},
            **{"eval_strategy": "steps", "eval_steps": 3, "num_dev": 4},
        },
        ["--metric_for_best_model accuracy", "waits for what falls"],
    ),
    "metrics of no dev loss": ({"eval_metric": True}, ["--eval_metric", "give --eval_strategy"]),
    "best of nothing": (
        {
            **{"save_strategy": "best", "save_steps": None},
            **{"eval_strategy": "steps", "eval_steps": 2, "num_dev": 4},
        },
        ["--save_strategy best", "--metric_for_best_model: give loss"],
    ),
    "batches by length": (
        {"train_sampling_strategy": "group_by_length"},
        ["--train_sampling_strategy group_by_length"],
    ),
    "large seed": ({"seed": 2**32}, ["--seed 4294967296"]),
    "nothing to train on": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5000},
        ["--dataloader_drop_last", "5000 examples"],
    ),
    "one file twice": (
        {"predictions_file": "same.json", "result_file": "same.json"},
        ["--predictions_file same.json is --result_file too"],
    ),
    "max_steps 0": ({"max_steps": 0}, ["--max_steps 0"]),
    "epochs": ({"max_steps": None, "num_train_epochs": 0}, ["--num_train_epochs 0"]),
    "batch size 0": ({"per_device_train_batch_size": 0}, ["--per_device_train_batch_size 0"]),
    "accumulation 0": ({"gradient_accumulation_steps": 0}, ["--gradient_accumulation_steps 0"]),
    "save_steps 0": ({"save_steps": 0}, ["--save_steps 0"]),
    "no number": ({"num_eval": "many"}, ["--num_eval", "many"]),
    "no truth value": ({"train_as_classification": "maybe"}, ["maybe"]),
    "unknown trainer": ({"trainer": "sgd"}, ["--trainer", "sgd", "zo"]),
    "unknown scheduler": ({"lr_scheduler_type": "steps"}, ["--lr_scheduler_type", "cosine"]),
    "scheduler without its number": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        ["cosine_with_min_lr", "--lr_scheduler_kwargs"],
    ),
    "decay_step of a constant": ({"decay_step": 2}, ["--decay_step 2", "linear or cosine"]),
    "decay_step at the end": (
        {"decay_step": 6, "lr_scheduler_type": "linear"},
        ["--decay_step 6", "--max_steps"],
    ),
    "unknown strategy": ({"evaluation_strategy": "often"}, ["--evaluation_strategy", "often"]),
    "dev loss without dev": ({"eval_strategy": "steps"}, ["--eval_strategy steps", "--num_dev"]),
    "strategies that do not match": (
        {"load_best_model_at_end": True, "num_dev": 4, "eval_strategy": "epoch"},
        ["--load_best_model_at_end", "Save strategy"],
    ),
    "unknown report target": ({"report_to": "paper"}, ["--report_to paper", "tensorboard"]),
    "gradient clipping": ({"max_grad_norm": 0.5}, ["--max_grad_norm 0.5"]),
    "optimizer": ({"optim": "sgd"}, ["--optim sgd"]),
    "fp16": ({"fp16": True}, ["--fp16", "--load_float16"]),
    "two ways to draw": (
        {"train_set_seed": 1, "num_train_sets": 2},
        ["--train_set_seed", "--num_train_sets"],
    ),
    "calibrated training": ({"sfc": True}, ["--sfc", "--trainer none"]),
    "no liger kernels": ({"use_liger_kernel": True}, ["--use_liger_kernel", "pip install"]),
    "a Hub that is not there": ({"push_to_hub": True}, ["--push_to_hub", "--save_model"]),
    "dev loss at the start": ({"eval_on_start": True}, ["--eval_on_start", "--num_dev"]),
    "the worst checkpoint": (
        {
            **{"load_best_model_at_end": True, "greater_is_better": "True", "num_dev": 4},
            **{"eval_strategy": "steps", "eval_steps": 3},
        },
        ["--greater_is_better", "lowest"],
    ),
    "a TPU": ({"debug": "tpu_metrics_debug"}, ["--debug tpu_metrics_debug", "TPU"]),
    "processes": ({"ddp_backend": "gloo"}, ["--ddp_backend gloo", "torchrun"]),
    "DeepSpeed": ({"deepspeed": "ds.json"}, ["--deepspeed", "--fsdp"]),
    "cut batches": (
        {"accelerator_config": '{"dispatch_batches": true}'},
        ["--accelerator_config dispatch_batches"],
    ),
    "no package for the optimizer": (
        REGULAR | {"optim": "galore_adamw", "optim_target_modules": "attn"},
        ["--optim galore_adamw", "galore_torch"],
    ),
    "another one": (REGULAR | {"optim": "adamw_bnb_8bit"}, ["--optim adamw_bnb_8bit"]),
    "and one that says it in its own way": (REGULAR | {"optim": "grokadamw"}, ["grokadamw"]),
    "modules of an optimizer without": (
        REGULAR | {"optim_target_modules": "attn"},
        ["--optim_target_modules attn", "--optim adamw_torch_fused"],
    ),
    "arguments of no optimizer": (
        REGULAR | {"optim_args": "momentum=0.9"},
        ["--optim_args momentum=0.9", "changes nothing of --optim adamw_torch_fused"],
    ),
    "one argument of none": (
        REGULAR | {"optim": "sgd", "optim_args": "momentum=0.9,beta=1"},
        ["--optim_args beta=1", "--optim sgd"],
    ),
    "no arguments": (REGULAR | {"optim_args": "0.9"}, ["--optim_args 0.9", "name=value"]),
    "betas of SGD": (
        REGULAR | {"optim": "sgd", "adam_beta1": 0.5},
        ["--adam_beta1 0.5", "changes nothing of --optim sgd"],
    ),
    "unknown compiler": (
        REGULAR | {"torch_compile_backend": "nothing"},
        ["--torch_compile_backend nothing", "inductor"],
    ),
    "unknown mode of the compiler": (
        REGULAR | {"torch_compile_mode": "nothing"},
        ["--torch_compile_mode nothing", "max-autotune"],
    ),
    "rank above the matrices'": (
        {"lora": True, "lora_r": 33},
        ["--lora_r 33", "32", "hidden size"],
    ),
    "classes of a text": (
        {"task_name": "SQuAD"},
        ["--train_as_classification", "SQuAD", "leave it out"],
    ),
    "no checkpoint": ({"resume_from_checkpoint": "nowhere"}, ["nowhere", "trainer_state.json"]),
    "nothing to resume": ({"resume_from_checkpoint": "True"}, ["--resume_from_checkpoint"]),
    "unknown argument": ({"zo_epss": 1}, ["--zo_epss", "did you mean --zo_eps?"]),
    "hopeless argument": ({"qqqqq": 1}, ["--qqqqq", "--help"]),
}

BAD_EVALUATION = {
    "calibration of a text": ({"task_name": "SQuAD", "sfc": True}, ["--sfc", "SQuAD"]),
    "both calibrations": ({"sfc": True, "icl_sfc": True}, ["--sfc and --icl_sfc"]),
    "8 bit without GPU": ({"load_int8": True}, ["--load_int8", "GPU"]),
    "no room for a prompt": (
        {"task_name": "DROP", "max_new_tokens": 1024},
        ["--max_new_tokens 1024", "1024"],
    ),
    "more beams than tokens": (
        {"task_name": "SQuAD", "num_beams": 100_000},
        ["--num_beams 100000", "1536", "vocabulary"],
    ),
    "no end": ({"task_name": "DROP", "eos_token": ""}, ["--eos_token"]),
    "temperature 0": ({"temperature": 0}, ["--temperature 0"]),
    "top_p": ({"top_p": 1.5}, ["--top_p 1.5"]),
    "top_k": ({"top_k": 0}, ["--top_k 0"]),
    "no beams": ({"num_beams": 0}, ["--num_beams 0"]),
    "dev without training": ({"num_dev": 5}, ["--num_dev 5", "--trainer none"]),
    "classification without training": (
        {"train_as_classification": True},
        ["--train_as_classification", "--trainer none"],
    ),
}


def assert_refused(
    argv: list[str], folder: Path, capfd: pytest.CaptureFixture[str], parts: list[str]
) -> None:
    before = contents(folder)
    capfd.readouterr()
    assert run.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and contents(folder) == before
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_bad_training_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: tuple
) -> None:
    arguments, parts = case
    name = arguments.get("task_name", "SST2")
    others = {key: value for key, value in arguments.items() if key != "task_name"}
    assert_refused(training(tmp_path, name, **others), tmp_path, capfd, parts)


@pytest.mark.parametrize("case", BAD_EVALUATION.values(), ids=BAD_EVALUATION)
def test_bad_evaluation_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: tuple
) -> None:
    arguments, parts = case
    assert_refused(command(**arguments), tmp_path, capfd, parts)


def test_good_training_is_not_refused(tmp_path: Path) -> None:
    """What the cases above are added to."""
    assert parse_arguments(training(tmp_path)).trainer == "zo"


@pytest.mark.parametrize(
    "missing",
    [
        ([], "--task_name is missing"),
        (["--task_name", "SST2"], "--model_name is missing"),
        (["--model_name"], "expected one argument"),
    ],
    ids=str,
)
def test_missing_arguments(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], missing: tuple[list[str], str]
) -> None:
    argv, part = missing
    assert_refused(["--num_eval", "5", *argv], tmp_path, capfd, [part])


def test_report_target_that_is_not_installed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "command_line.trainer_checks.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    argv = training(tmp_path, report_to="wandb")
    assert_refused(argv, tmp_path, capfd, ["--report_to wandb", "pip install wandb"])


PLACES = {
    "result under a file": {"result_file": "file/x.json"},
    "result is a folder": {"result_file": "folder"},
    "predictions under a file": {"predictions_file": "file/x.jsonl"},
    "output_dir is a file": {"output_dir": "file"},
    "output_dir under a file": {"output_dir": "file/out"},
    "no place for folders": {"output_dir": "/proc/out"},
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_impossible_places_are_refused_before_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], place: dict[str, str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    ((name, value),) = place.items()
    assert_refused(training(tmp_path, **place), tmp_path, capfd, [f"--{name} {value}"])


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def with_architecture(name: str, model_type: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": [name], "model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "corrupt weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"garbage" * 9),
        "no causal language model there",
    ),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:100_000]
        ),
        "no causal language model there",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "cut config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "op'),
        "no causal language model there",
    ),
    "no tokenizer": (without_tokenizer, "no tokenizer there"),
    "masked": (with_architecture("BertForMaskedLM", "bert"), "BertForMaskedLM"),
    "translation": (with_architecture("T5ForConditionalGeneration", "t5"), "T5Config"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_model_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: tuple
) -> None:
    change, part = damage
    shutil.copytree(MODEL, tmp_path / "model")
    change(tmp_path / "model")
    argv = training(tmp_path, model_name=tmp_path / "model")
    assert_refused(argv, tmp_path, capfd, [f"--model_name {tmp_path / 'model'}", part])


def test_train_file_without_a_column(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data" / "SST2"
    shutil.copytree(SAMPLES / "sst2", folder)
    (folder / "train.jsonl").write_text('{"text": "good", "label": 1}\n')
    argv = training(tmp_path, data_dir=tmp_path / "data")
    assert_refused(argv, tmp_path, capfd, ["train.jsonl", "'sentence' is missing"])


def test_checkpoint_of_another_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    finish(training(tmp_path, model_name=MODEL, max_steps=3))
    (tmp_path / "result.json").unlink()
    config = json.loads((MODEL / "config.json").read_text())
    for name, change in (("wide", {"ffn_dim": 256}), ("deep", {"num_hidden_layers": 4})):
        shutil.copytree(MODEL, tmp_path / name / "tiny-opt")
        changed = {key: value for key, value in (config | change).items() if key != "model_type"}
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **changed))
        other.save_pretrained(tmp_path / name / "tiny-opt")
        argv = training(tmp_path, max_steps=6, model_name=tmp_path / name / "tiny-opt")
        assert_refused(argv, tmp_path, capfd, ["checkpoint-3 is a checkpoint of another model"])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"learning_rate": 2e-4}, "--learning_rate 0.0001, not 0.0002"),
        ({"num_train": 11}, "--num_train 12, not 11"),
        ({"seed": 1}, "--seed 42, not 1"),
        ({"hessian_smooth_type": "constant0"}, "--hessian_smooth_type constant1e-2"),
        ({"trainer": "regular"}, "--trainer zo, not regular"),
    ],
    ids=str,
)
def test_checkpoint_of_another_experiment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: dict, part: str
) -> None:
    finish(training(tmp_path, max_steps=1, save_steps=1))
    argv = training(tmp_path, **({"save_steps": 1} | change))
    assert_refused(argv, tmp_path, capfd, [part, "--overwrite_output_dir"])


# ------------------------------------------------------------------------------------ good input


def test_aliases() -> None:
    arguments = parse_arguments(
        [
            *command(num_eval=None),
            *("--num_test", "7", "--trainer", "zo", "--num_train", "5", "--num_dev", "3"),
            *("--evaluation_strategy", "steps", "--eval_steps", "2", "--overwrite_output_dir"),
            *("--zo_lr_scheduler_type", "linear", "--warmup_step", "4"),
        ]
    )
    assert arguments.num_eval == 7 and arguments.eval_strategy == "steps"
    assert arguments.overwrite_output_dir is True
    assert arguments.lr_scheduler_type == "linear" and arguments.warmup_steps == 4


def test_evaluation_strategy_no() -> None:
    arguments = parse_arguments([*command(), "--evaluation_strategy", "no"])
    assert arguments.eval_strategy == "no"


def test_last_value_wins(tmp_path: Path) -> None:
    argv = [*training(tmp_path), "--train_as_classification", "False", "--num_eval", "9"]
    arguments = parse_arguments(argv)
    assert arguments.train_as_classification is False and arguments.num_eval == 9


def test_code_of_a_model_is_not_trusted_by_default() -> None:
    assert parse_arguments(command()).trust_remote_code is False


def test_help_lists_every_argument_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        run.main(["--help"])
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    inherited = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    ours = [
        field
        for field in dataclasses.fields(Arguments)
        if field.init and field is not inherited.get(field.name)
    ]
    assert len(ours) > 40
    for field in ours:
        assert f"--{field.name}" in text
    for field in ours:
        if field.name not in inherited:
            assert len(field.metadata["help"]) > 15, field.name
