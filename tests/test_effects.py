"""Arguments without effect are named in one line and left out; bounds of all numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args, get_type_hints

import pytest
from running import command
from transformers import TrainingArguments

from command_line.arguments import Arguments, check, parse_arguments
from command_line.declarations import LARGEST
from command_line.effects import BACKWARD, FORWARD, STEPS, TRAINED
from command_line.published import IGNORED
from command_line.reading import DECLARED, OWN
from command_line.settings import experiment_hash, settings_of_a_checkpoint
from command_line.trainer_arguments import NOT_OFFERED, MostUsed
from utils import InputError

ZO: dict[str, Any] = {"trainer": "zo", "num_train": 8, "max_steps": 4}
HIZOO = ZO | {"hessian_smooth_type": "constant1e-8"}
REGULAR = ZO | {"trainer": "regular"}
BROADCAST = ZO | {"trainer": "broadcast"}
PROBING = {"trainer": "regular", "num_train": 8, "linear_probing": True}
NO_EVAL = ZO | {"no_eval": True, "num_eval": None}
# What the user gives, and what the line says.
WITHOUT_EFFECT: dict[str, tuple[dict[str, Any], str]] = {
    "training without --trainer": (
        {"max_steps": 20, "learning_rate": 1e-3, "output_dir": "x", "num_dev": 5, "lora": True},
        "--max_steps, --learning_rate, --output_dir, --num_dev, --lora (nothing is trained)",
    ),
    "no evaluation of what is only evaluated": (
        {"no_eval": True, "num_eval": 3, "predictions_file": "p.jsonl"},
        "warning: no effect here: --no_eval (nothing is trained)",
    ),
    "sets beside a seed": (
        {"num_train": 4, "num_train_sets": 2, "train_set_seed": 1},
        "--num_train_sets (--train_set_seed decides)",
    ),
    "a probe with zo": (
        PROBING | {"trainer": "zo", "zo_eps": 1e-3},
        "--zo_eps (--linear_probing has no steps), "
        "--trainer zo (--linear_probing is a logistic regression)",
    ),
    "a probe with error broadcast": (
        PROBING | {"trainer": "broadcast", "broadcast_rate": 0.5},
        "--broadcast_rate (--linear_probing has no steps), "
        "--trainer broadcast (--linear_probing is a logistic regression)",
    ),
    "zeroth order with error broadcast": (
        BROADCAST
        | {"learning_rate": "auto", "zo_eps": 1e-3, "hessian_smooth_type": "constant1e-8"}
        | {"torch_compile": True, "untie_emb": True, "reward_samples": 2},
        "--learning_rate (--trainer broadcast has --broadcast_rate), "
        "--zo_eps, --hessian_smooth_type, --reward_samples (without --trainer zo), "
        "--torch_compile (only --trainer regular has a backward pass), "
        "--untie_emb (--trainer broadcast trains no head)",
    ),
    "error broadcast for others": (
        ZO | {"broadcast_rate": 0.5, "broadcast_from": 0.25, "broadcast_matrices": "o"},
        "--broadcast_rate, --broadcast_from, --broadcast_matrices (without --trainer broadcast)",
    ),
    "float16 without a GPU": (REGULAR | {"fp16": True}, "--fp16 (there is no GPU: float32)"),
    "sets of nothing": ({"num_train_sets": 2}, "--num_train_sets (there are no demonstrations)"),
    "h of backpropagation": (
        REGULAR | {"hessian": "lowrank", "zo_eps": 1e-3},
        "--hessian, --zo_eps (without --trainer zo)",
    ),
    "recomputation for HiZOO": (
        ZO | {"gradient_checkpointing": True, "torch_compile": True},
        "--gradient_checkpointing, --torch_compile (only --trainer regular has a backward pass)",
    ),
    "a low-rank h that stays 1": (
        ZO | {"hessian_smooth_type": "constant0", "hessian": "lowrank"},
        "--hessian (h stays 1 with a smoothing of 0)",
    ),
    "generation from options": (
        {"num_beams": 2, "top_k": 5, "max_new_tokens": 5},
        "--num_beams, --top_k, --max_new_tokens (the task has options)",
    ),
    "temperature without sampling": (
        {"task_name": "SQuAD", "temperature": 0.7},
        "--temperature (without --sampling)",
    ),
    "generation without evaluation": (
        NO_EVAL | {"task_name": "SQuAD", "max_new_tokens": 5},
        "--max_new_tokens (nothing is generated)",
    ),
    "steps of other strategies": (
        ZO | {"save_strategy": "epoch", "save_steps": 2, "eval_steps": 2},
        "--save_steps (without --save_strategy steps), --eval_steps (without --eval_strat",
    ),
    "a limit of nothing": (
        ZO | {"save_strategy": "no", "save_total_limit": 1, "metric_for_best_model": "loss"},
        "--save_total_limit (no checkpoint is saved), "
        "--metric_for_best_model (no best model is looked for)",
    ),
    "the best of nothing": (
        ZO | {"save_strategy": "no", "load_best_model_at_end": True},
        "--load_best_model_at_end (no checkpoint is saved)",
    ),
    "a run without evaluation": (
        NO_EVAL | {"predictions_file": "p.jsonl", "num_eval": 5, "per_device_eval_batch_size": 4},
        "--num_eval, --predictions_file, --per_device_eval_batch_size (nothing is evaluated)",
    ),
    "dev examples of no use": (NO_EVAL | {"num_dev": 5}, "--num_dev (--no_eval, and no --eval_s"),
    "prompts of a classification": (
        ZO | {"train_as_classification": True, "only_train_option": False},
        "--only_train_option (for the language-model loss)",
    ),
    "epochs beside steps": (
        ZO | {"num_train_epochs": 2},
        "--num_train_epochs (--max_steps decides)",
    ),
    "the wrong seed": (
        {"num_train": 4, "seed": 0},
        "--seed (demonstrations are drawn by --train_set_seed)",
    ),
    "steps of a probe": (PROBING | {"max_steps": 4}, "--max_steps (--linear_probing has no steps)"),
    "ways to train": (
        ZO | {"lora": True, "num_prefix": 4, "lp_early_stopping": True},
        "--num_prefix (without --prefix_tuning), --lp_early_stopping (without --linear_probing)",
    ),
    "metric of a task": ({"metric": "f1"}, "--metric (a task has its metrics)"),
    "a secret": ({"hub_token": "hf_secret"}, "--hub_token (nothing is trained)"),
    "of published commands": (
        ZO
        | {"do_train": True, "do_eval": True, "logging_dir": "x", "group_by_length": "False"}
        | {"save_safetensors": True, "fsdp_transformer_layer_cls_to_wrap": "OPTDecoderLayer"},
        "--do_train, --do_eval (--trainer and --no_eval decide), "
        "--logging_dir (logs lie in --output_dir), --group_by_length (batches are packed), "
        "--save_safetensors (checkpoints are safetensors), "
        "--fsdp_transformer_layer_cls_to_wrap (transformers finds the layers)",
    ),
}
# With an effect, or to switch off what is off anyway.
SILENT: dict[str, dict[str, Any]] = {
    "nothing on": {
        **{"num_dev": 0, "train_as_classification": False, "evaluation_strategy": "no"},
        **{"lora": False, "warmup_step": 0, "report_to": "none", "no_reparam": True, "fsdp": ""},
        **{"label_smoothing_factor": 0, "gradient_checkpointing": False},
    },
    "in context": {"num_train": 32, "num_train_sets": 2, "icl_sfc": True},
    "sampled text": {"task_name": "SQuAD", "sampling": True, "seed": 1, "top_p": 0.5},
    "zero-shot before training alone": {
        **ZO | {"no_eval": True, "eval_before_training": True, "num_eval": 5},
        **{"task_name": "SQuAD", "max_new_tokens": 5},
    },
    "dev losses alone": NO_EVAL | {"num_dev": 5, "eval_strategy": "epoch"},
    "generation as the objective": {
        **NO_EVAL | {"task_name": "SQuAD", "non_diff": True, "max_new_tokens": 5}
    },
    "dev losses on the eval examples": ZO | {"no_eval": True, "eval_strategy": "epoch"},
    "MeZO": ZO | {"hessian_smooth_type": "constant0", "decay_step": 0, "max_grad_norm": 0},
    "error broadcast": {
        **BROADCAST | {"broadcast_rate": 0, "broadcast_from": 0.25, "broadcast_tokens": 9},
        **{"lr_scheduler_type": "cosine", "decay_step": 2, "warmup_steps": 1, "weight_decay": 0},
        **{"load_bfloat16": True, "gradient_accumulation_steps": 2, "lora": False},
        **{"num_dev": 5, "eval_strategy": "epoch", "save_strategy": "no"},
    },
    "AdamW's own": REGULAR | {"adam_beta1": 0.5, "bf16": True},
    # --no_eval itself has no effect there.
    "evaluation alone": {"no_eval": False, "num_eval": 3, "predictions_file": "p.jsonl"},
    "dev losses from the second epoch on": {
        **ZO | {"num_dev": 5, "eval_strategy": "epoch", "eval_delay": 2}
    },
    "eval_steps as many as logging_steps": {
        **ZO | {"num_dev": 5, "eval_strategy": "steps", "logging_strategy": "epoch"},
        "logging_steps": 7,
    },
    "a probe": PROBING | {"num_dev": 5, "save_model": True, "lp_early_stopping": True},
    "of the machine": {"no_auto_device": True, "ddp_timeout": 60, "use_cpu": True},
}


def parsed(*argv: str, **arguments: Any) -> Arguments:
    made = parse_arguments([*command(**{"num_eval": None} | arguments), *argv])
    check(made)
    return made


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_one_line_names_what_has_no_effect() -> None:
    failures = {}
    for case, (arguments, said) in WITHOUT_EFFECT.items():
        line = parsed(**arguments).warning or ""
        if not line.startswith("warning: no effect here: ") or said not in line:
            failures[case] = line
        if "\n" in line or "secret" in line:
            failures[case] = line
    assert not failures


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_nothing_is_said_of_what_has_an_effect() -> None:
    failures = {case: parsed(**arguments).warning for case, arguments in SILENT.items()}
    assert not {case: line for case, line in failures.items() if line}


def test_what_has_no_effect_changes_nothing() -> None:
    plain = parsed(**ZO)
    more = parsed(**ZO, lora_r=3, num_prefix=2, top_k=4, eval_steps=2)
    assert more.lora_r == 8 and more.eval_steps is None
    assert experiment_hash(plain) == experiment_hash(more)


def test_what_changes_the_result_is_refused() -> None:
    for arguments, said in (
        (ZO | {"fp16": True}, "--fp16"),
        (ZO | {"optim": "sgd", "adam_beta1": 0.5}, "--optim sgd"),
        (ZO | {"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
        (REGULAR | {"non_diff": True}, "--non_diff"),
        (BROADCAST | {"weight_decay": 0.1}, "--weight_decay 0.1: .* has no weight decay"),
        (BROADCAST | {"bf16": True, "max_grad_norm": 1}, "--bf16, --max_grad_norm 1"),
        (ZO | {"sfc": True}, "--sfc"),
    ):
        with pytest.raises(InputError, match=f"^{said}"):
            parsed(**arguments)
    # Nothing is trained: nothing changes.
    assert "--fp16, --optim" in (parsed(fp16=True, optim="sgd").warning or "")


def test_what_decides_the_weights_is_kept_for_a_resumed_run() -> None:
    plain = settings_of_a_checkpoint(parsed(**REGULAR, eval_strategy="epoch")).keys()
    assert plain >= {
        *("train_sampling_strategy", "ignore_data_skip", "use_liger_kernel"),
        *("optim_target_modules", "auto_find_batch_size"),
    }
    for schedule in ("reduce_lr_on_plateau", "greedy"):
        dev = {"lr_scheduler_type": schedule, "eval_strategy": "steps"}
        course = settings_of_a_checkpoint(parsed(**REGULAR | dev))
        assert course["metric_for_best_model"] == "loss" and course["eval_steps"] == 10
        assert course.keys() - plain == {
            *("metric_for_best_model", "eval_strategy", "eval_steps", "eval_delay", "num_eval")
        }
        assert "num_eval" not in settings_of_a_checkpoint(parsed(**REGULAR | dev, num_dev=4))


# -------------------------------------------------------------------------------- declarations


def test_every_argument_is_declared_once() -> None:
    """A new release of transformers may bring one: declare it in trainer_arguments.py."""
    of_trainer = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert sorted(of_trainer - DECLARED.keys() - NOT_OFFERED.keys() - IGNORED.keys()) == []
    assert not DECLARED.keys() & {*NOT_OFFERED, *IGNORED}
    assert {field.name for field in dataclasses.fields(Arguments) if field.init} >= {*DECLARED}
    hidden = of_trainer - DECLARED.keys()
    assert hidden <= {*NOT_OFFERED, *IGNORED}


def test_most_used_have_the_trainers_defaults() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(MostUsed):
        assert field.default == theirs[field.name], field.name


def test_conditions_hold_for_all_inside() -> None:
    for outer, base in (
        (TRAINED, parsed()),
        (STEPS, parsed(**PROBING)),
        (BACKWARD, parsed(**ZO)),
        (FORWARD, parsed(**REGULAR)),
        (BACKWARD, parsed(**BROADCAST)),
        (FORWARD, parsed(**BROADCAST)),
    ):
        inside = [each for each in DECLARED.values() if each.effect and _is_in(each.effect, outer)]
        assert len(inside) > 5 and all(each.effect.unmet(base) for each in inside)


def _is_in(effect: Any, outer: Any) -> bool:
    return effect is outer or bool(effect.inside and _is_in(effect.inside, outer))


def test_numbers_outside_their_bounds() -> None:
    kinds = get_type_hints(Arguments)
    numbers = {
        name: float if float in (kinds[name], *get_args(kinds[name])) else int
        for name in DECLARED
        if {int, float} & {kinds[name], *get_args(kinds[name])}
    }
    assert len(numbers) > 40
    for name, kind in numbers.items():
        declared = DECLARED[name]
        assert declared.kind is kind and (declared.at_least, declared.above) != (None, None), name
        lowest = declared.at_least if declared.above is None else declared.above
        bad = ["nan", "inf", "-inf", "1e400", "many", f"{lowest - 1}", ""]
        bad += ["1.5", f"{10**30}", f"{10**400}"] if kind is int else []
        bad += ["0"] if declared.above == 0 else []
        for value in bad:
            with pytest.raises(InputError, match=f"^--{name} {value}".rstrip()):
                parse_arguments([f"--{name}={value}"])


def test_ends_of_the_bounds() -> None:
    for name, good, bad in (
        ("save_total_limit", [1], [0, -2]),
        ("logging_steps", [1, 0.5], [-1, 1.5]),
        ("warmup_steps", [0, 0.5, 3], [-1, 2.5]),
        ("max_steps", [-1, 1], [0, -2]),
        ("top_p", [0.1, 1], [0, 1.1]),
        ("broadcast_from", [0, 0.99], [1, -0.1, "auto"]),
        ("broadcast_rate", [0, 2], [-1]),
        ("broadcast_damping", [1e-9], [0]),
        ("broadcast_tokens", [1], [0]),
        ("adam_beta1", [0, 0.9], [1, -0.1]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("num_train", [0, LARGEST], [-1, LARGEST + 1]),
    ):
        for value in good:
            parse_arguments([f"--{name}", str(value)])
        for value in bad:
            with pytest.raises(InputError, match=rf"^--{name} {value}: must be "):
                parse_arguments([f"--{name}", str(value)])


def test_own_values_are_typed() -> None:
    read = OWN["zo_eps"].read
    assert read(["auto"]) == "auto" and read(["1e-3"]) == 1e-3 and not math.isnan(read(["2"]))
    assert OWN["trainer"].read(["Zo"]) == "zo"
    assert OWN["report_to"].read(["wandb", "tensorboard"]) == ["wandb", "tensorboard"]
    for name, words in (("lora", ["maybe"]), ("tag", []), ("tag", ["a", "b"]), ("zo_eps", ["x"])):
        with pytest.raises(ValueError, match=r"must be|give one value"):
            OWN[name].read(words)
