"""From arguments to what a run needs: examples, tokens, the model, what it trains and towards what.

Everything is checked here before it is used; nothing is written.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from command_line.arguments import Arguments
from command_line.checks import check_sizes
from command_line.settings import length_of_run, settings_of_a_checkpoint
from command_line.values import AUTO
from hizoo import HiZOO
from language_model.adapters import (
    add_lora,
    add_prefix,
    random_tokens,
    save_merged,
    without_adapter,
)
from language_model.chat import Chat
from language_model.encoding import Encoder
from language_model.generation import GenerationSettings, check_generation
from language_model.head import freeze_all_but_head, head_is_tied, untie_head
from language_model.loading import (
    choose_dtype,
    choose_max_length,
    load_config_and_tokenizer,
    load_model,
)
from language_model.objectives import (
    NegativeTextMetric,
    Objective,
    PromptExample,
    classification_loss,
    collate_prompts,
    language_model_loss,
    negative_accuracy,
)
from language_model.packing import collate
from language_model.prediction import predict
from language_model.saved_adapters import SavedAdapter
from language_model.shared_tokens import can_share_prompt
from task_data.sampling import ExampleSet, draw_example_sets
from tasks import Sample, load_samples
from trainer import CURVATURE_PART, SmoothingSchedule, ZerothOrderSettings, ZerothOrderTrainer
from training.checkpoints import RunSettings, write_together
from training.objective_trainer import ObjectiveTrainer
from training.recording import Recording
from utils import InputError


@dataclass(frozen=True)
class Prepared:
    """What all runs of an experiment share.

    Attributes:
        encoder: the task, the tokenizer, and how the two make tokens.
        generation: how text is generated, where a task's answers are.
        example_sets: the examples of each run.
    """

    encoder: Encoder
    generation: GenerationSettings
    example_sets: list[ExampleSet]


class Training(NamedTuple):
    """What is made small, how a sample is encoded for it, and how examples become a batch."""

    objective: Objective
    encode: Callable[[Sample], Any]
    collate: Callable[[list[Any]], dict[str, Any]]


def prepare(arguments: Arguments) -> Prepared:
    """Load and check everything but the weights; nothing is written yet.

    Raises:
        InputError: the model, the data or a number does not fit.
    """
    encoder, generation = prepare_encoder(arguments)
    train, validation = load_samples(encoder.task, arguments.data_dir)
    return Prepared(
        encoder,
        generation,
        draw_example_sets(
            train,
            validation,
            num_train=arguments.num_train,
            num_dev=arguments.num_dev or 0,
            num_eval=arguments.num_eval,
            num_train_sets=arguments.num_train_sets,
            train_set_seed=arguments.train_set_seed,
            in_context=arguments.trainer == "none",
        ),
    )


def prepare_encoder(arguments: Arguments) -> tuple[Encoder, GenerationSettings]:
    """Load the tokenizer, and return how it makes tokens of samples, and how text is generated.

    Raises:
        InputError: the model or a number does not fit.
    """
    task = arguments.task
    config, tokenizer = load_config_and_tokenizer(arguments.model_name, arguments.trust_remote_code)
    check_sizes(arguments, config)
    adapter = SavedAdapter.find(arguments.model_name)
    if adapter and arguments.trainer != "none":
        _check_trained_further(arguments, adapter)
    num_prefix = arguments.num_prefix if arguments.prefix_tuning else 0
    max_length = _room_for_texts(
        arguments.max_length, config, adapter.num_prefix if adapter else num_prefix
    )
    chat = Chat(tokenizer, arguments.system_prompt) if arguments.apply_chat_template else None
    if chat:
        chat.check(arguments.model_name)
    generation = generation_settings(arguments)
    if task.generation:
        check_generation(generation, tokenizer, max_length)
    return Encoder(task, tokenizer, max_length, arguments.max_new_tokens, chat), generation


def generation_settings(arguments: Arguments) -> GenerationSettings:
    """Return what the arguments say about generated text."""
    return GenerationSettings(
        arguments.max_new_tokens,
        arguments.eos_token.replace("\\n", "\n"),
        arguments.sampling,
        arguments.temperature,
        arguments.num_beams,
        arguments.top_k,
        arguments.top_p,
    )


def _check_trained_further(arguments: Arguments, adapter: SavedAdapter) -> None:
    """Refuse to train anything but the adapter that ``--model_name`` brings along."""
    mode = adapter.mode
    if not getattr(arguments, mode):
        raise InputError(
            f"--model_name {adapter.folder} is a checkpoint of --{mode}: train it further with "
            f"--{mode}, or give its model {adapter.base}"
        )
    for name, value in adapter.settings.items():
        if getattr(arguments, name) != value:
            raise InputError(
                f"--{name} {getattr(arguments, name)}: the adapter in {adapter.folder} has "
                f"{value}; give --{name} {value}"
            )


def _room_for_texts(requested: int | None, config: PreTrainedConfig, num_prefix: int) -> int:
    """Return the tokens that a text may have, beside those of prefix-tuning."""
    # The prefix takes positions of its own before every text.
    max_length = choose_max_length(requested, config) - num_prefix
    if max_length < 2:
        raise InputError(
            f"--num_prefix {num_prefix} leaves no room for a text in --max_length "
            f"{max_length + num_prefix}"
        )
    return max_length


def load_pretrained(arguments: Arguments) -> PreTrainedModel | PeftModel:
    """Load the model anew: each run starts from the pre-trained weights, or from a saved adapter.

    Raises:
        InputError: there is no such model, or it does not fit the arguments.
    """
    model = load_model(
        arguments.model_name,
        choose_dtype(arguments.load_float16, arguments.load_bfloat16),
        8 if arguments.load_int8 else 4 if arguments.load_int4 else None,
        not arguments.no_auto_device,
        arguments.trust_remote_code,
    )
    # Sharding moves each layer itself: no GPU has room for all of them.
    placed = getattr(model, "hf_device_map", None) is not None
    if not placed and not arguments.fsdp:
        model.to(arguments.device)
    return model


def choose_trained_weights(
    arguments: Arguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> PreTrainedModel | PeftModel:
    """Return the model with what is trained: an adapter, the head, or all of its weights."""
    # Whatever ran before, a run's adapter starts from the same random numbers.
    transformers.set_seed(arguments.seed)
    if arguments.untie_emb:
        untie_head(without_adapter(model))
    if isinstance(model, PeftModel):
        return model
    if arguments.lora:
        return add_lora(model, arguments.lora_r, arguments.lora_alpha)
    if arguments.prefix_tuning:
        tokens = random_tokens(tokenizer, arguments.num_prefix, arguments.seed)
        return add_prefix(
            model,
            arguments.num_prefix,
            reparameterise=not arguments.no_reparam,
            tokens=tokens if arguments.prefix_init_by_real_act else None,
        )
    if arguments.head_tuning:
        if head_is_tied(model):
            say("the head is tied: the input embeddings are trained with it (--untie_emb)")
        freeze_all_but_head(model)
    return model


def choose_objective(
    arguments: Arguments, model: PreTrainedModel | PeftModel, prepared: Prepared
) -> Training:
    """Return what training makes small, for the task and the arguments."""
    encoder = prepared.encoder
    share = can_share_prompt(model, encoder.max_length)
    packed = functools.partial(collate, share_prompt=share)
    if arguments.train_as_classification:
        return Training(classification_loss, encoder.options, packed)
    if encoder.task.reward or (arguments.non_diff and encoder.task.generation):
        return _text_objective(arguments, prepared)
    if not arguments.non_diff:
        only_option = arguments.only_train_option
        encode = functools.partial(encoder.correct_option, only_option=only_option)
        return Training(language_model_loss, encode, packed)
    return Training(negative_accuracy, encoder.options, packed)


def _text_objective(arguments: Arguments, prepared: Prepared) -> Training:
    """Return the metric of generated texts; several texts of a prompt are sampled."""
    encoder, generation, count = prepared.encoder, prepared.generation, 1
    metric = arguments.non_diff_metric or "f1"
    if encoder.task.reward:
        metric, count = "reward", arguments.reward_samples
        generation = replace(generation, sampling=generation.sampling or count > 1)
    objective = NegativeTextMetric(
        encoder.task, metric, encoder.tokenizer, generation, count, arguments.seed
    )

    def encode(sample: Sample) -> PromptExample:
        return PromptExample(encoder.prompt(sample), sample)

    return Training(objective, encode, collate_prompts)


def make_trainer(
    arguments: Arguments,
    model: PreTrainedModel | PeftModel,
    prepared: Prepared,
    examples: ExampleSet,
    output_dir: Path,
    recording: Recording | None = None,
) -> ObjectiveTrainer:
    """Return what trains ``model`` on a run's examples, with ``recording`` of its journal.

    Raises:
        InputError: the model, the machine and the arguments do not go together.
    """
    training = choose_objective(arguments, model, prepared)
    of_trainer = copy.copy(arguments)
    of_trainer.output_dir = str(output_dir)
    if arguments.learning_rate == AUTO:
        of_trainer.learning_rate = CURVATURE_PART
    shared = {
        "model": model,
        "args": of_trainer,
        "train_dataset": [training.encode(sample) for sample in examples.train],
        "eval_dataset": [training.encode(sample) for sample in examples.dev] or None,
        "processing_class": prepared.encoder.tokenizer,
        "objective": training.objective,
        "data_collator": training.collate,
        "decay_step": arguments.decay_step,
        "max_skipped_steps": arguments.max_skipped_steps,
        "dev_metric": dev_metric(arguments, prepared, examples),
        "callbacks": [RunSettings(settings_of_a_checkpoint(arguments) | length_of_run(arguments))],
    }
    if arguments.trainer == "zo":
        settings = zeroth_order_settings(arguments)
        return ZerothOrderTrainer(settings=settings, recording=recording, **shared)
    return ObjectiveTrainer(**shared)


def save_trained(trainer: ObjectiveTrainer, folder: Path, merge: bool) -> None:
    """Write a trained model, or with ``merge`` the model that its LoRA matrices make of it."""
    if not merge:
        trainer.save_model(str(folder))
        return
    model = trainer.accelerator.unwrap_model(trainer.model)

    def write() -> None:
        if trainer.args.should_save:
            save_merged(model, folder)
            trainer.processing_class.save_pretrained(folder)

    write_together(folder, write)


def dev_metric(
    arguments: Arguments, prepared: Prepared, examples: ExampleSet
) -> Callable[[PreTrainedModel], dict[str, float]] | None:
    """Return what measures the task's metrics on the dev set; None: they are not asked for."""
    task, dev = prepared.encoder.task, examples.dev
    if not arguments.wants_dev_metric or not dev:
        return None

    def measure(model: PreTrainedModel) -> dict[str, float]:
        predictions = predict(
            *(model, prepared.encoder, dev, [()] * len(dev), arguments.per_device_eval_batch_size),
            generation=prepared.generation,
            progress=None if arguments.quiet else f"dev {task.metric_name}",
        )
        return task.score([prediction.answer for prediction in predictions], dev)

    return measure


def chosen_by_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, str | None]:
    """Return what HiZOO has made of settings that may be "auto"; nothing for other optimizers.

    ``hessian_dtype`` is that of the full h, None if there is none.
    """
    if not isinstance(optimizer, HiZOO):
        return {}
    full = (state.get("hessian_minus_one") for state in optimizer.state.values())
    dtypes = {str(h.dtype).removeprefix("torch.") for h in full if h is not None}
    return {
        "zo_perturbation": perturbation_of(optimizer),
        "hessian_dtype": ", ".join(sorted(dtypes)) or None,
    }


def perturbation_of(optimizer: HiZOO) -> str | None:
    """Return how weights are perturbed; None: not at all, examples have directions of their own."""
    if optimizer.directions is not None:
        return None
    return "inplace" if optimizer.layers is None else "layerwise"


def zeroth_order_settings(arguments: Arguments) -> ZerothOrderSettings:
    """Return what the arguments say about the zeroth-order step."""
    dtype = arguments.hessian_dtype
    smoothing = SmoothingSchedule.parse(arguments.hessian_smooth_type)
    by_curvature = arguments.learning_rate == AUTO
    return ZerothOrderSettings(
        smoothing=smoothing,
        # The default is the μ until a probe has found one.
        eps=ZerothOrderSettings.eps if arguments.zo_eps == AUTO else arguments.zo_eps,
        hessian=arguments.hessian,
        hessian_dtype=None if dtype == "auto" else getattr(torch, dtype),
        perturbation=arguments.zo_perturbation,
        num_samples=arguments.zo_num_samples,
        step_size="curvature" if by_curvature else "fixed",
        curvature_eps=None if arguments.curvature_eps == AUTO else arguments.curvature_eps,
        curvature_every=arguments.curvature_every,
        clip=None if arguments.zo_clip == "none" else arguments.zo_clip,
        directions=arguments.zo_directions,
        normalize=arguments.zo_normalize,
        parallel=arguments.shared_by_processes,
        compile={"auto": None, "yes": True, "no": False}[arguments.zo_compile],
    )
