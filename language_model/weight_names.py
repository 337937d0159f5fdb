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

    transformers loads some families under other names than their files have (GPT-NeoX's head).
    """
    without_values = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    return revert_weight_conversion(model, without_values)


def own_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the model's names of its weights by those that ``save_pretrained`` gives.

    A weight that is stored in other pieces is left out, and so is one that is tied to another.
    """
    state, tied = model.state_dict(keep_vars=True), tied_weights(model)
    empty = {n: torch.empty_like(t, device="meta") for n, t in state.items() if n not in tied}
    own = {id(tensor): name for name, tensor in empty.items()}
    saved = revert_weight_conversion(model, dict(empty))
    return {name: own[id(tensor)] for name, tensor in saved.items() if id(tensor) in own}


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
