"""Adapters: LoRA and prefix-tuning, with peft's modules and in peft's files.

Only the adapter's weights are trained and saved. They are float32 whatever the model's dtype.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from utils import InputError, first_line

# The query and value projections, or the layer that a family has fused them into.
FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
PROJECTIONS = (("q_proj", "v_proj"), ("query", "value"), *((name,) for name in FUSED))
# Hidden size of the network that makes the prefix (Li and Liang 2021, arXiv 2101.00190, 512).
REPARAMETERISATION_SIZE = 512
PROMPT_ENCODER_FILE = "prompt_encoder.safetensors"

# A deprecation between peft and transformers.
warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)

KeysAndValues = tuple[tuple[Tensor, Tensor], ...]


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model that an adapter, if any, was added to."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def add_lora(model: PreTrainedModel, rank: int, alpha: int) -> PeftModel:
    """Add LoRA (Hu et al. 2021, arXiv 2106.09685) to the query and value projections.

    The second matrix starts at 0, so the model's predictions start unchanged.
    """
    layers = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    targets = next((names for names in PROJECTIONS if layers.keys() >= set(names)), None)
    if targets is None:
        raise InputError(
            f"--lora: {type(model).__name__} has no query and value projections that are known "
            f"(its layers are {', '.join(sorted(layers))}); train another model, or without --lora"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        fan_in_fan_out=isinstance(layers[targets[0]], Conv1D),
    )
    adapted = get_peft_model(model, config)
    config.target_modules = [*targets]  # peft's set would be saved in another order each time
    return adapted


# ------------------------------------------------------------------------------------ prefix-tuning


class PrefixTunedModel(PeftModelForCausalLM):
    """A causal language model with a trained prefix: keys and values in every layer.

    Unlike peft's model, it takes 4-D attention masks and position ids, which describe the text
    alone: position 0 follows the prefix. A caller's ``past_key_values`` must begin with the prefix.
    Checkpoints also hold the network that makes the prefix: peft's file has the prefix only.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; arguments and result are those of the model without prefix."""
        if past_key_values is None:
            length = self.active_peft_config.num_virtual_tokens
            past_key_values = self.get_prompt(batch_size=len(input_ids))
            if attention_mask is not None:
                # 1 shows a token in a 2-D mask; a 4-D mask is added to the attention's scores.
                shown = 1 if attention_mask.dim() == 2 else 0
                attention_mask = nn.functional.pad(attention_mask, (length, 0), value=shown)
            if position_ids is not None:
                position_ids = position_ids + length
        return self.get_base_model()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the adapter for ``PeftModel.from_pretrained``, and the network for resuming."""
        super().save_pretrained(save_directory, **kwargs)
        if self.active_peft_config.prefix_projection and kwargs.get("is_main_process", True):
            save_file(self._prompt_encoder.state_dict(), Path(save_directory) / PROMPT_ENCODER_FILE)

    def load_adapter(self, model_id: str, adapter_name: str, **kwargs: Any) -> Any:
        """Load a checkpoint's prefix, or the network that makes it."""
        if self.active_peft_config.prefix_projection:
            tensors = load_file(Path(model_id) / PROMPT_ENCODER_FILE)
            return self._prompt_encoder.load_state_dict(tensors)
        return super().load_adapter(model_id, adapter_name, **kwargs)

    @property
    def _prompt_encoder(self) -> nn.Module:
        return self.prompt_encoder[self.active_adapter]


def add_prefix(
    model: PreTrainedModel, num_tokens: int, reparameterise: bool, tokens: Tensor | None
) -> PrefixTunedModel:
    """Add a prefix (Li and Liang 2021, arXiv 2101.00190) of keys and values to every layer.

    It starts from the keys and values of ``tokens``, (num_tokens,), or from noise. With
    ``reparameterise`` a two-layer network that makes the prefix is trained, not the prefix itself.
    """
    try:
        activations = keys_and_values(model, torch.zeros(1).long() if tokens is None else tokens)
        ((heads, head_size),) = {
            (tensor.shape[1], tensor.shape[3]) for layer in activations for tensor in layer
        }
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"--prefix_tuning: the layers of {type(model).__name__} do not all have keys and "
            "values of one size for every token; use --lora"
        ) from error
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=num_tokens,
        prefix_projection=reparameterise,
        encoder_hidden_size=REPARAMETERISATION_SIZE,
        # Many families' configurations have other names for these than peft expects.
        num_layers=len(activations),
        num_attention_heads=heads,
        token_dim=heads * head_size,
    )
    adapted = PrefixTunedModel(model, config)
    if tokens is not None:
        _start_from(adapted._prompt_encoder, activations)
    return adapted


@torch.no_grad()
def keys_and_values(
    model: PreTrainedModel, tokens: Tensor, cache: DynamicCache | None = None, **how: Any
) -> KeysAndValues:
    """Return the keys and values of a text in every layer, (1, heads, tokens, head size) each.

    Those in ``cache`` come first.
    """
    cache = cache or DynamicCache()
    text = tokens.unsqueeze(0).to(model.device)
    model(input_ids=text, past_key_values=cache, use_cache=True, **how)
    return tuple((layer.keys, layer.values) for layer in cache.layers)


@torch.no_grad()
def _start_from(encoder: nn.Module, activations: KeysAndValues) -> None:
    """Set peft's prefix encoder so that the prefix is ``activations``."""
    # (tokens, heads, head size) of keys, then of values, layer by layer.
    tensors = [tensor[0].transpose(0, 1) for layer in activations for tensor in layer]
    target = torch.stack(tensors, dim=1).flatten(1)
    if not encoder.prefix_projection:
        encoder.embedding.weight.copy_(target)
        return
    # The network's last layer is solved for: there are far fewer tokens than hidden units.
    first, activation, last = encoder.transform
    hidden = activation(first(encoder.embedding.weight)).double()
    missing = target.double() - last.bias.double() - hidden @ last.weight.double().T
    last.weight.add_(torch.linalg.lstsq(hidden, missing).solution.T)


def random_tokens(tokenizer: PreTrainedTokenizerBase, number: int, seed: int) -> Tensor:
    """Return tokens of the vocabulary, (number,), none of them special, sampled with a seed."""
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (number,), generator=generator)]


def prefix_of(model: nn.Module) -> KeysAndValues:
    """Return the keys and values of a model's prefix, (1, heads, tokens, head size); or ()."""
    if not isinstance(model, PrefixTunedModel):
        return ()
    return tuple((layer.keys, layer.values) for layer in model.get_prompt(batch_size=1).layers)


def prefix_length(model: nn.Module) -> int:
    """Return how many tokens of prefix-tuning come before every text."""
    tuned = isinstance(model, PrefixTunedModel)
    return model.active_peft_config.num_virtual_tokens if tuned else 0


# --------------------------------------------------------------------------------- adapters on disk


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder of its own, without the weights of its base model."""

    folder: Path
    config: LoraConfig | PrefixTuningConfig

    @classmethod
    def find(cls, name: str) -> SavedAdapter | None:
        """Return the adapter in the local folder ``name``; None if there is none."""
        folder = Path(name)
        if not (folder / CONFIG_NAME).is_file():
            return None
        try:
            config = PeftConfig.from_pretrained(name)
        except Exception as error:  # whatever a damaged file leads to
            raise InputError(
                f"--model_name {name}: its {CONFIG_NAME} is damaged ({first_line(error)}); give "
                "another checkpoint"
            ) from error
        if not isinstance(config, LoraConfig | PrefixTuningConfig):
            raise InputError(
                f"--model_name {name}: an adapter of kind {config.peft_type.value}; give one of "
                "LoRA or prefix-tuning, or a whole model"
            )
        return cls(folder, config)

    @property
    def base(self) -> str:
        """The base model: a folder, a GGUF file, or a Hub id.

        A relative path is looked up below the working directory, where it was when the adapter was
        saved, then below the folders that hold the adapter.
        """
        name = self.config.base_model_name_or_path or ""
        for parent in (Path(), *self.folder.absolute().parents):
            path = parent / name
            if name and (path.is_dir() or (path.suffix == ".gguf" and path.is_file())):
                return str(path)
        return name

    @property
    def mode(self) -> str:
        """The argument of run.py that trains such an adapter."""
        return "lora" if isinstance(self.config, LoraConfig) else "prefix_tuning"

    @property
    def settings(self) -> dict[str, Any]:
        """The values of run.py's arguments that the adapter was made with."""
        if isinstance(self.config, LoraConfig):
            return {"lora_r": self.config.r, "lora_alpha": self.config.lora_alpha}
        return {"num_prefix": self.num_prefix, "no_reparam": not self._has_network}

    @property
    def num_prefix(self) -> int:
        """How many tokens come before every text."""
        return getattr(self.config, "num_virtual_tokens", 0)

    @property
    def _has_network(self) -> bool:
        """Whether the network that makes the prefix is there; peft alone saves the prefix only."""
        return (self.folder / PROMPT_ENCODER_FILE).is_file()

    def load(self, model: PreTrainedModel) -> PeftModel:
        """Return ``model`` with the adapter, which may be trained further."""
        config = self.config
        config.inference_mode = False
        config.base_model_name_or_path = self.base
        kind = PeftModelForCausalLM
        if isinstance(config, PrefixTuningConfig):
            kind, config.prefix_projection = PrefixTunedModel, self._has_network
        try:
            adapted = kind(model, config)
            name = adapted.active_adapter
            missing = adapted.load_adapter(str(self.folder), name, is_trainable=True)[0]
            if missing:
                raise LookupError(f"{missing[0]} is missing")
        except Exception as error:  # whatever damaged files, and another model's, lead to
            raise InputError(
                f"--model_name {self.folder}: its adapter does not fit {self.base} "
                f"({first_line(error)}); give another checkpoint, or correct "
                f"base_model_name_or_path in its {CONFIG_NAME}"
            ) from error
        return adapted.eval()


# ------------------------------------------------------------------------------------------ merging


def save_merged(model: PeftModel, folder: Path) -> None:
    """Write the model with the adapter merged into its weights; ``model`` itself is unchanged.

    A head that the adapter parts from the embeddings is saved with weights of its own.
    """
    base = model.get_base_model()
    merged = base.state_dict()
    for name, tensors in merged_modules(model):
        merged = {key: t for key, t in merged.items() if not key.startswith(f"{name}.")}
        merged |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    ties = base.get_expanded_tied_weights_keys(all_submodels=True)
    parted = any(not torch.equal(merged[one], merged[other]) for one, other in ties.items())
    if parted:
        merged |= {name: merged[name].clone() for name in ties}
    base.save_pretrained(folder, state_dict=merged)
    if parted:
        config = copy.deepcopy(base.config)
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
        config.save_pretrained(folder)


def check_merge(model: PeftModel) -> None:
    """Raise ``InputError`` if the adapter cannot be merged; merging each module shows it."""
    try:
        for _ in merged_modules(model):
            pass
    except Exception as error:  # peft raises several kinds
        raise InputError(
            f"--merge_adapter: peft cannot merge this adapter ({first_line(error)}); leave it out"
        ) from error


def merged_modules(model: PeftModel) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every module that the adapter changes: its name in the base model, merged tensors.

    One module at a time is merged, and restored: a merged copy of the model would need the memory
    of a second one.
    """
    done: tuple[str, ...] = ()
    for name, module in model.get_base_model().named_modules():
        adapted = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if not adapted or name.startswith(done):
            continue
        done += (f"{name}.",)
        before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        if hasattr(module, "unload_and_optionally_merge_module"):
            plain = module.unload_and_optionally_merge_module(True, False, None)
        else:
            module.merge()
            plain = module.get_base_layer()
        yield name, {key: tensor.clone() for key, tensor in plain.state_dict().items()}
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.unmerge()
        # Subtracting what was added rounds.
        module.load_state_dict(before)
