"""Adapters in folders of their own, as a LoRA or prefix-tuning run saves them: found and loaded.

Such a folder has the adapter's weights and the name of the base model, whose weights it lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, PrefixTuningConfig
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel

from language_model.adapters import PROMPT_ENCODER_FILE, PrefixTunedModel
from utils import InputError, first_line


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk, with peft's configuration of it."""

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
        except Exception as error:  # whatever damaged files, and another model's, lead to
            raise self._unfit(first_line(error)) from error
        if missing:
            raise self._unfit(f"{missing[0]} is missing")
        return adapted.eval()

    def _unfit(self, reason: str) -> InputError:
        return InputError(
            f"--model_name {self.folder}: its adapter does not fit {self.base} ({reason}); give "
            f"another checkpoint, or correct base_model_name_or_path in its {CONFIG_NAME}"
        )
