"""Arguments without effect: every one is in the table, and refused where it does nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, get_args, get_type_hints

import pytest
from running import command

from command_line.applicability import BACKPROPAGATION, SCOPES, STEPS, TRAINING, ZEROTH_ORDER, Scope
from command_line.arguments import Arguments, parse_arguments
from command_line.checks import check
from command_line.unknown import NOT_OFFERED
from utils import InputError

ZERO_SHOT: dict[str, Any] = {}
ZO: dict[str, Any] = {"trainer": "zo", "num_train": 8, "max_steps": 4}
REGULAR = ZO | {"trainer": "regular"}
PROBING = {"trainer": "regular", "num_train": 8, "linear_probing": True}

# What the user gives, and what the line says: the argument, the reason and the way out.
WITHOUT_EFFECT = {
    "training without --trainer": (
        {"max_steps": 20, "learning_rate": 1e-3},
        ["--max_steps 20, --learning_rate 0.001: nothing is trained", "add --trainer zo or"],
    ),
    "resuming without training": (
        {"trainer": "none", "resume_from_checkpoint": "/no/such"},
        ["--resume_from_checkpoint /no/such: nothing is trained with --trainer none"],
    ),
    "sets of nothing": ({"num_train_sets": 2}, ["--num_train_sets 2", "give --num_train"]),
    "calibration of nothing": ({"icl_sfc": True}, ["--icl_sfc: there are no demonstrations"]),
    "h of backpropagation": (
        REGULAR | {"hessian": "lowrank", "zo_eps": 1e-3},
        ["--zo_eps 0.001, --hessian lowrank: --trainer regular", "use --trainer zo"],
    ),
    "AdamW's arguments for HiZOO": (
        ZO | {"adam_beta1": 0.5, "optim_args": "a=1"},
        ["--optim_args a=1, --adam_beta1 0.5: --trainer zo has", "leave them out"],
    ),
    "bf16 for HiZOO": (ZO | {"bf16": True}, ["--bf16", "use --load_float16 or --load_bfloat16"]),
    "compiling for HiZOO": (ZO | {"torch_compile": True}, ["--torch_compile", "--zo_compile"]),
    "noise for HiZOO": (ZO | {"neftune_noise_alpha": 5}, ["--neftune_noise_alpha 5"]),
    "a low-rank h that stays 1": (
        ZO | {"hessian_smooth_type": "constant0", "hessian": "lowrank"},
        ["--hessian lowrank: with --hessian_smooth_type constant0 h stays 1"],
    ),
    "the dtype of an h that stays 1": (
        ZO | {"hessian_smooth_type": "linear0", "hessian_dtype": "float32"},
        ["--hessian_dtype float32: with --hessian_smooth_type linear0 h stays 1"],
    ),
    "the dtype of a low-rank h": (
        ZO | {"hessian": "lowrank", "hessian_dtype": "float32"},
        ["--hessian_dtype float32: the vectors of --hessian lowrank are float64"],
    ),
    "generation from options": (
        {"sampling": True, "num_beams": 2, "temperature": 0.7, "max_new_tokens": 5},
        ["--sampling, --num_beams 2, --max_new_tokens 5, --temperature 0.7", "SST2 are chosen"],
    ),
    "temperature without sampling": (
        {"task_name": "SQuAD", "temperature": 0.7, "top_k": 3, "top_p": 0.5},
        ["--temperature 0.7, --top_k 3, --top_p 0.5: the likeliest text", "add --sampling"],
    ),
    "generation without evaluation": (
        ZO | {"task_name": "SQuAD", "no_eval": True, "max_new_tokens": 5},
        ["--max_new_tokens 5: nothing is generated with --no_eval"],
    ),
    "save_steps by epoch": (
        ZO | {"save_strategy": "epoch", "save_steps": 2},
        ["--save_steps 2: --save_strategy epoch does not go by steps"],
    ),
    "eval_steps of nothing": (
        ZO | {"eval_steps": 2},
        ["--eval_steps 2: --eval_strategy no does not", "give --eval_strategy steps"],
    ),
    "limit of nothing": (ZO | {"save_strategy": "no", "save_total_limit": 1}, ["--save_total_l"]),
    "predictions without evaluation": (
        ZO | {"no_eval": True, "predictions_file": "p.jsonl", "verbose": True},
        ["--predictions_file p.jsonl, --verbose: nothing is predicted with --no_eval"],
    ),
    "eval examples without evaluation": (
        ZO | {"no_eval": True, "num_eval": 5},
        ["--num_eval 5: nothing is evaluated with --no_eval"],
    ),
    "dev examples without evaluation": (
        ZO | {"no_eval": True, "num_dev": 5},
        ["--num_dev 5: with --no_eval and without --eval_strategy"],
    ),
    "prompts of a classification": (
        ZO | {"train_as_classification": True, "only_train_option": False},
        ["--only_train_option False", "--train_as_classification"],
    ),
    "epochs beside steps": (
        ZO | {"num_train_epochs": 2},
        ["--num_train_epochs 2: --max_steps 4 says", "give --max_steps -1"],
    ),
    "demonstrations by the wrong seed": (
        {"num_train": 4, "seed": 1},
        ["--seed 1: nothing is drawn but examples", "give --train_set_seed"],
    ),
    "batches of no evaluation": (
        ZO | {"no_eval": True, "per_device_eval_batch_size": 4},
        ["--per_device_eval_batch_size 4: nothing is evaluated"],
    ),
    "steps of a probe": (
        PROBING | {"max_steps": 4, "fp16": True},
        ["--max_steps 4, --fp16: --linear_probing fits without steps"],
    ),
    "rank without LoRA": (ZO | {"lora_r": 4}, ["--lora_r 4: it belongs to --lora"]),
    "metric of a task": ({"metric": "f1"}, ["--metric f1", "--train_file"]),
    "best of nothing": (ZO | {"metric_for_best_model": "loss"}, ["--load_best_model_at_end"]),
    "a secret": (ZO | {"hub_token": "hf_secret"}, ["--hub_token: nothing goes to the Hub"]),
    "workers' batches": (ZO | {"dataloader_persistent_workers": True}, ["--dataloader_num_worke"]),
}
# With an effect, or to switch off what is off anyway.
ACCEPTED = {
    "zero-shot, nothing on": {
        **{"num_dev": 0, "train_as_classification": False, "evaluation_strategy": "no"},
        **{"lora": False, "warmup_step": 0, "report_to": "none", "no_reparam": True},
    },
    "in context": {"num_train": 32, "num_train_sets": 2, "icl_sfc": True},
    "sampled text": {"task_name": "SQuAD", "sampling": True, "seed": 1, "top_p": 0.5},
    "zero-shot before training alone": {
        **ZO | {"no_eval": True, "eval_before_training": True, "num_eval": 5},
        **{"task_name": "SQuAD", "max_new_tokens": 5},
    },
    "dev losses alone": ZO | {"no_eval": True, "num_dev": 5, "eval_strategy": "epoch"},
    "generation as the objective": {
        **ZO | {"task_name": "SQuAD", "non_diff": True, "no_eval": True, "max_new_tokens": 5}
    },
    "MeZO": ZO | {"hessian_smooth_type": "constant0", "decay_step": 0, "max_grad_norm": 0},
    "AdamW's own": REGULAR | {"adam_beta1": 0.5, "bf16": True, "max_skipped_steps": 5},
    "a probe": PROBING | {"num_dev": 5, "save_model": True, "lp_early_stopping": True},
}


def refusal(*argv: str, **arguments: Any) -> str | None:
    """What is said about a command line, or None."""
    try:
        check(parse_arguments([*command(**{"num_eval": None} | arguments), *argv]))
    except InputError as error:
        return str(error)
    return None


def names_inside(outer: Scope) -> list[str]:
    return [name for scope in SCOPES if outer in scope.chain() for name in scope.names]


def some_value(name: str) -> str:
    """A value of an argument's kind that asks for something."""
    annotation = get_type_hints(Arguments)[name]
    kinds = get_args(annotation) or (annotation,)
    default = Arguments.__dataclass_fields__[name].default
    choices = [kind for part in kinds for kind in get_args(part) if isinstance(kind, str)]
    choices += [kind for kind in kinds if isinstance(kind, str)]
    texts = {"lr_scheduler_type": "cosine", "optim": "sgd", "save_strategy": "epoch"}
    texts |= dict.fromkeys(("eval_strategy", "logging_strategy"), "epoch")
    texts |= {"hub_strategy": "end", "report_to": "tensorboard", "debug": "underflow_overflow"}
    texts |= {"train_sampling_strategy": "sequential", "hessian_smooth_type": "constant1e-3"}
    texts |= dict.fromkeys(("log_level", "log_level_replica"), "debug")
    texts |= {"dataloader_multiprocessing_context": "fork", "include_num_input_tokens_seen": "yes"}
    texts["fsdp"] = "full_shard"
    if name in texts:
        return texts[name]
    if name.endswith(("_kwargs", "_config")):
        return "{}"
    if bool in kinds:
        return str(not default)
    if float in kinds:
        return "0.5"
    return choices[1] if choices else "3"


def test_every_argument_is_in_one_place() -> None:
    """An argument that a new release of transformers brings has to be put into the table."""
    arguments = {field.name for field in dataclasses.fields(Arguments) if field.init}
    placed = Counter([*NOT_OFFERED, *(name for scope in SCOPES for name in scope.names)])
    assert sorted(arguments - placed.keys()) == []
    assert sorted(placed.keys() - arguments) == []
    assert [name for name, places in placed.items() if places > 1] == []


def test_every_scope_says_why_and_where() -> None:
    for scope in SCOPES:
        assert scope.where and (scope.reason or not scope.outer), scope.names
        assert all(outer in SCOPES for outer in scope.chain())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("scope", "base", "reason"),
    [
        (TRAINING, ZERO_SHOT, TRAINING.reason),
        (STEPS, PROBING, STEPS.reason),
        (BACKPROPAGATION, ZO, BACKPROPAGATION.reason),
        (ZEROTH_ORDER, REGULAR, ZEROTH_ORDER.reason),
    ],
    ids=["training", "steps", "backpropagation", "zeroth order"],
)
def test_all_of_a_scope_is_refused_outside_it(
    scope: Scope, base: dict[str, Any], reason: str
) -> None:
    for name in names_inside(scope):
        said = refusal(f"--{name}", some_value(name), **base)
        assert said is not None and f"--{name}" in said, name
        # transformers itself refuses two of them without what they need.
        if name not in ("dataloader_prefetch_factor", "load_best_model_at_end"):
            assert reason in said, (name, said)


@pytest.mark.parametrize("case", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_argument_without_effect_is_refused(case: tuple[dict[str, Any], list[str]]) -> None:
    arguments, parts = case
    said = refusal(**arguments)
    assert said is not None and "\n" not in said and "secret" not in said
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED)
def test_argument_with_an_effect_is_not_refused(arguments: dict[str, Any]) -> None:
    assert refusal(**arguments) is None


def test_a_value_that_is_the_default_is_given_all_the_same() -> None:
    assert "--zo_eps 0.001" in (refusal("--zo_eps", "1e-3", **REGULAR) or "")
    assert "--hessian full" in (refusal("--hessian", "full", **REGULAR) or "")


def test_what_a_script_chooses_is_not_given_by_the_user() -> None:
    script = ["--save_strategy", "steps", "--save_steps", "7", "--zo_eps", "1e-2", "--num_dev", "2"]
    start = [*command(num_eval=5), "--trainer", "zo", "--num_train", "8", "--max_steps", "2"]
    for further in (
        ["--save_strategy", "no"],
        ["--trainer", "regular"],
        ["--no_eval"],
        ["--save_steps", "9"],
    ):
        arguments = parse_arguments([*start, *script, "--", *further])
        check(arguments)
        assert arguments.given_by_user == {further[0].removeprefix("--")}
        assert {"save_steps", "zo_eps", further[0].removeprefix("--")} <= arguments.given
    assert arguments.save_steps == 9 and arguments.zo_eps == 1e-2
    # The same behind the border, or without one, is the user's.
    for argv in (
        [*start, "--", *script, "--save_strategy", "no"],
        [*start, *script, "--save_strategy", "no"],
    ):
        with pytest.raises(InputError, match="--save_steps 7: --save_strategy no"):
            check(parse_arguments(argv))


def test_what_the_machine_decides_is_never_refused() -> None:
    assert refusal(no_auto_device=True, ddp_timeout=60, tf32=False, use_cpu=True) is None
