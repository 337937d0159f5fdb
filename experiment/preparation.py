"""What a run needs before its first forward pass: tokenizer, examples, model, trained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import transformers
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment.options import ModelOptions, Options, TrainedWeights
from language_model import adapters
from language_model.encoding import Chat, Encoder
from language_model.generation import check_generation
from language_model.head import freeze_all_but_head, head_is_tied, untie_head
from language_model.loading import choose_max_length, load_config_and_tokenizer, load_model
from task_data.files import errors_name, row_place
from task_data.loading import load_samples
from task_data.sampling import ExampleSet
from training.checkpoints import MANIFEST, STATE, damage
from training.processes import from_first_process
from utils import InputError

# What all runs of an experiment share: how samples become tokens, and each run's examples.
Prepared = tuple[Encoder, list[ExampleSet]]


def prepare(options: Options) -> Prepared:
    """Load and check everything but the weights.

    Raises:
        InputError: the model, the data or a number does not fit.
    """
    encoder = prepare_encoder(options)
    sets = options.draw(*load_samples(options.task, options.arguments.data_dir))
    for examples in sets:
        check_conversations(encoder, examples, "validation data")
        number, arguments = len(examples.train), options.arguments
        if arguments.has_steps and not arguments.batches_of_an_epoch(number):
            few = f"{number} training examples, {arguments.examples_of_a_batch} a step"
            raise InputError(f"--dataloader_drop_last leaves nothing of {few}: leave it out")
    return encoder, sets


def check_conversations(encoder: Encoder, examples: ExampleSet, evaluated: str) -> None:
    """Refuse examples that a chat template changes; those to report on lie in ``evaluated``."""
    shown = zip(examples.evaluation, examples.demonstrations, strict=True)
    trained = ((sample, ()) for sample in examples.train + examples.dev)
    for source, pairs in (("training data", trained), (evaluated, shown)):
        for sample, demonstrations in pairs if encoder.chat else ():
            with errors_name(row_place(source, sample.id)):
                encoder.check_conversation(sample, demonstrations)


def prepare_encoder(options: Options) -> Encoder:
    """Load the tokenizer, and return how it makes tokens of samples.

    Raises:
        InputError: the model or a number does not fit, or a checkpoint is damaged.
    """
    model, weights, arguments = options.model, options.weights, options.arguments
    adapter, generation = adapters.SavedAdapter.find(model.name), options.generation
    for name in [model.name, adapter.base] if adapter else [model.name]:
        _check_whole(Path(name))
    config, tokenizer = load_config_and_tokenizer(model.name, model.trust_remote_code)
    num_prefix = weights.num_prefix if weights.mode == "prefix_tuning" else 0
    if adapter:
        num_prefix = adapter.num_prefix
        if options.trains:
            _check_trained_further(weights, adapter)
    # A prefix takes positions of its own before every text.
    max_length = choose_max_length(arguments.max_length, config) - num_prefix
    if max_length < 2:
        raise InputError(
            f"--num_prefix {num_prefix} leaves no room for a text in --max_length "
            f"{max_length + num_prefix}"
        )
    chat = Chat(tokenizer, arguments.system_prompt) if arguments.apply_chat_template else None
    if chat:
        chat.check(model.name)
    if options.task.generation:
        check_generation(generation, tokenizer, max_length)
    room = generation.max_new_tokens if options.task.generation else 0
    return Encoder(options.task, tokenizer, max_length, room, chat)


def _check_whole(folder: Path) -> None:
    """Refuse a model that is a damaged checkpoint of ours."""
    is_checkpoint = (folder / MANIFEST).is_file() and (folder / STATE).is_file()
    if is_checkpoint and (reason := from_first_process(lambda: damage(folder))):
        raise InputError(
            f"--model_name {folder} is a damaged checkpoint: {reason}; give another one, or delete "
            f"its {MANIFEST} if you have changed the file yourself"
        )


def _check_trained_further(weights: TrainedWeights, adapter: adapters.SavedAdapter) -> None:
    """Refuse to train anything but the adapter that ``--model_name`` brings along."""
    if weights.mode != adapter.mode:
        raise InputError(
            f"--model_name {adapter.folder} is a checkpoint of --{adapter.mode}: train it further "
            f"with --{adapter.mode}, or give its model {adapter.base}"
        )
    for name, value in adapter.settings.items():
        given = getattr(weights, name)
        if given != value:
            raise InputError(
                f"--{name} {given}: the adapter in {adapter.folder} has {value}; give --{name} "
                f"{value}"
            )


def load_pretrained(options: ModelOptions) -> PreTrainedModel | PeftModel:
    """Load the model anew: each run starts from pre-trained weights, or a saved adapter.

    Raises:
        InputError: there is no such model, or it does not fit the options.
    """
    spread, code = options.spread, options.trust_remote_code
    model = load_model(options.name, options.dtype, spread, code, options.offload)
    placed = options.offload or getattr(model, "hf_device_map", None)
    if options.device and not placed:
        model.to(options.device)
    return model


def choose_trained_weights(
    model: PreTrainedModel | PeftModel,
    weights: TrainedWeights,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None] = lambda line: None,
) -> PreTrainedModel | PeftModel:
    """Return the model with what is trained: an adapter, the head, or all of its weights.

    Raises:
        InputError: some of the model does not fit the GPUs, or the head cannot be untied.
    """
    # transformers moves what the GPUs have no room for to the host's memory or to disk.
    elsewhere = getattr(model, "hf_device_map", None) and any(p.is_meta for p in model.parameters())
    if elsewhere and weights.mode != "linear_probing":
        raise InputError(
            "the model does not fit the GPUs, and a model that lies partly elsewhere cannot be "
            "trained: give --offload cpu, --load_bfloat16 or more GPUs"
        )
    # An adapter starts from the same random numbers, whatever ran before.
    transformers.set_seed(weights.seed)
    if weights.untie_emb:
        untie_head(adapters.without_adapter(model))
    if isinstance(model, PeftModel):
        return model
    if weights.mode == "lora":
        return adapters.add_lora(model, weights.lora_r, weights.lora_alpha)
    if weights.mode == "prefix_tuning":
        tokens = adapters.random_tokens(tokenizer, weights.num_prefix, weights.seed)
        return adapters.add_prefix(
            model,
            weights.num_prefix,
            reparameterise=not weights.no_reparam,
            tokens=tokens if weights.prefix_init_by_real_act else None,
        )
    if weights.mode == "head_tuning":
        if head_is_tied(model):
            say("the head is tied: the input embeddings are trained with it (--untie_emb)")
        freeze_all_but_head(model)
    return model
