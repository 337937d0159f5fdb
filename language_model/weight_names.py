"""Names of a model's weights: in its files, and where several are one tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def tied_weights(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that are the same tensor as another weight."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def saved_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the model's tensors, without values, under the names that ``save_pretrained`` gives.

    Those that are tied to another one are left out. transformers loads some families under other
    names than their files have (GPT-NeoX's head), or in other pieces (Mixtral's experts).
    """
    state, tied = model.state_dict(keep_vars=True), tied_weights(model)
    without_values = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in state.items()
        if name not in tied
    }
    return revert_weight_conversion(model, without_values)


def load_renamed_weights(model: nn.Module, folder: Path) -> bool:
    """Load a checkpoint whose names are not the model's own; tell whether they are not.

    ``load_state_dict``, with which the Trainer resumes, would leave them out.
    """
    if not isinstance(model, PreTrainedModel) or saved_names(model).keys() <= set(
        model.state_dict()
    ):
        return False
    saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True
