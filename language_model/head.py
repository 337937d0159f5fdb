"""Training the language-model head alone: untying, head tuning, and linear probing.

Linear probing fits the head by logistic regression on hidden states (Kumar et al. 2022, arXiv
2202.10054; for language models MeZO, Malladi et al. 2023, arXiv 2305.17333): one forward pass over
the examples, no steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from language_model.batches import not_finite, run_in_batches
from language_model.encoding import EncodedExample
from language_model.packing import collate
from language_model.scoring import token_log_probabilities
from language_model.shared_tokens import can_share_prompt
from utils import InputError

# MeZO's: the solver stops at this largest entry of the gradient, or after so many iterations.
FITTING = {"tol": 1e-4, "max_iter": 5000}
EARLY_STOPPING = {"tol": 1e-2, "max_iter": 1000}


@dataclass(frozen=True)
class LinearProbe:
    """What a linear probe was fitted to, and how."""

    tokens: int  # distinct ones: the classes
    rows: int  # scored tokens
    iterations: int
    converged: bool  # False: the solver stopped early, the head is fitted less well


def head_is_tied(model: PreTrainedModel) -> bool:
    """Tell whether the head's weight is the input embeddings' weight: training one changes both."""
    return _head(model).weight is model.get_input_embeddings().weight


def untie_head(model: PreTrainedModel) -> None:
    """Give the head a weight of its own, for good: files that the model is saved to hold both.

    Logits do not change. An optimizer made before keeps the old weight: untie first.

    Raises:
        InputError: the head is of no known shape, or further weights of the model are tied, which
            the configuration can only switch off together with the head's.
    """
    head = _head(model)
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not ties and not head_is_tied(model):
        return
    (prefix,) = (name for name, module in model.named_modules() if module is head)
    own = {f"{prefix}.{name}" for name, _ in head.named_parameters()}
    others = sorted(target for target, source in ties.items() if not own & {target, source})
    if others:
        raise InputError(
            f"{type(model).__name__} ties more weights than its head's ({', '.join(others)}), so "
            "the head cannot be untied: leave out --untie_emb and --linear_probing"
        )
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Loading reads the configuration, saving the other two.
            module.config.tie_word_embeddings = False
            module._tied_weights_keys = {}
            module.all_tied_weights_keys = {}


def freeze_all_but_head(model: PreTrainedModel) -> None:
    """Leave only the head to train: its weight, which may be the embeddings' too, and its bias."""
    head = _head(model)
    model.requires_grad_(False)
    head.requires_grad_(True)


def _head(model: PreTrainedModel) -> nn.Module:
    """Return the module that makes logits of hidden states, as nn.Linear does."""
    head = model.get_output_embeddings()
    shape = tuple(getattr(getattr(head, "weight", None), "shape", ()))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if len(shape) != 2 or shape[0] != vocabulary:
        raise InputError(
            f"{type(model).__name__}: its head's weight has to be of shape ({vocabulary}, hidden "
            f"size), not {shape}; leave out --head_tuning, --linear_probing and --untie_emb"
        )
    return head


def fit_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    batch_size: int,
    early_stopping: bool = False,
) -> LinearProbe:
    """Fit the head to the correct answers by logistic regression, and change nothing else.

    Every scored token of an answer is a row: the hidden state that predicts it, and the token as
    its class. The fitted coefficients become the head's rows of these tokens (and the entries of
    its bias, if it has one): the softmax over their logits is the classifier's probability, unless
    the model scales or caps logits after the head (Cohere, Gemma 2). A tied head is untied.

    ``examples`` have their correct option alone (``Encoder.correct_option``). ``early_stopping``
    stops the solver sooner, against overfitting.

    Raises:
        InputError: all answers are of the same token, or the head cannot be fitted or untied.
        NotFinite: the hidden states are not finite. The model is unchanged in both cases.
    """
    head = _head(model)
    features, targets = answer_features(model, examples, batch_size)
    tokens = np.unique(targets)
    if len(tokens) < 2:
        raise InputError(
            f"--linear_probing: all answers among the {len(examples)} training examples are of the "
            f"one token {tokenizer.decode(tokens)!r}, there is nothing to tell apart; give a "
            "larger --num_train, or another task"
        )
    if not np.isfinite(features).all():
        raise not_finite("hidden states", model)
    # C is 1. MeZO's code chooses it by cross-validation, for which generated answers share too few
    # tokens.
    classifier = LogisticRegression(
        **(EARLY_STOPPING if early_stopping else FITTING),
        fit_intercept=getattr(head, "bias", None) is not None,
        random_state=0,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # In float32 rounding ends the solver, with probabilities up to 2e-4 off at any tolerance.
        classifier.fit(features.astype(np.float64), targets)
    untie_head(model)
    _write(classifier, head)
    return LinearProbe(
        tokens=len(tokens),
        rows=len(features),
        iterations=int(classifier.n_iter_.max()),
        converged=not any(issubclass(one.category, ConvergenceWarning) for one in caught),
    )


@torch.no_grad()
def answer_features(
    model: PreTrainedModel, examples: Sequence[EncodedExample], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the head reads where it predicts each scored token, and the tokens' ids.

    (scored tokens, hidden) in float32 and (scored tokens,), in the order of the examples, which
    have one option each.
    """
    model.eval()
    lengths = [len(option.tokens) for example in examples for option in example.options]
    share_rows = can_share_prompt(model, max(lengths))
    inputs: dict[str, Tensor] = {}
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep_input(_: nn.Module, arguments: tuple[Any, ...], __: Tensor) -> None:
        # Scoring has cut the input down to the predicting positions: (scored tokens, hidden).
        inputs["last"] = arguments[0].float().cpu()

    def read_batch(indices: list[int]) -> None:
        batch = collate([examples[index] for index in indices], share_prompt=share_rows)
        on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
        token_log_probabilities(model, on_device)
        counts = torch.bincount(batch["read_options"]).tolist()
        rows = zip(inputs["last"].split(counts), batch["targets"].split(counts), strict=True)
        found.update(zip(indices, rows, strict=True))

    with model.get_output_embeddings().register_forward_hook(keep_input):
        run_in_batches(read_batch, lengths, batch_size, "linear probing")
    features, targets = zip(*(found[index] for index in range(len(examples))), strict=True)
    return torch.cat(features).numpy(), torch.cat(targets).numpy()


@torch.no_grad()
def _write(classifier: LogisticRegression, head: nn.Module) -> None:
    """Make the classifier's coefficients the head's rows of its classes."""
    coefficients, intercepts = classifier.coef_, classifier.intercept_
    if len(classifier.classes_) == 2:
        # One row stands for the difference of the two logits.
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    tokens = torch.from_numpy(classifier.classes_).to(head.weight.device)
    head.weight[tokens] = torch.from_numpy(coefficients).to(head.weight)
    if classifier.fit_intercept:
        head.bias[tokens] = torch.from_numpy(intercepts).to(head.bias)
