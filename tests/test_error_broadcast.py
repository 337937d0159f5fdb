"""Error broadcast against the textbook step in float64, and what must hold of every step."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_scoring import samples_of
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor, nn

from error_broadcast import ErrorBroadcast, whitened
from language_model.encoding import Encoder
from language_model.objectives import classification_loss, language_model_loss
from language_model.packing import collate
from tasks import get_task
from zeroth_order.residual_stream import UnknownStream, find_blocks, writers_of

# Plain, flattened and biased, parallel, transposed weights, norms behind the matrices.
FAMILIES = ("llama", "opt", "gpt_neox", "gpt2", "gemma2")
OTHERS = (
    *("qwen2", "mistral", "phi", "gemma3", "olmo3", "exaone4", "starcoder2", "falcon", "bloom"),
    *("mpt", "gptj", "gpt_neo", "nanochat"),
)
Batch = dict[str, Tensor]


def model_of(family: str, dtype: torch.dtype = torch.float64, layers: int = 4) -> nn.Module:
    depth = "n_layer" if family in ("gpt2", "bloom", "gptj") else "num_hidden_layers"
    windows = ["sliding_attention", "full_attention"] * (layers // 2)
    kinds = {"layer_types": windows} if family in ("gemma3", "olmo3", "exaone4") else {}
    return tiny_model(family, **{depth: layers}, **kinds).to(dtype)


def batch_of(task: str = "CB", first: int = 0, last: int = 5, share_prompt: bool = True) -> Batch:
    samples = samples_of(task)[1][first:last]
    encoder = Encoder(get_task(task), tiny_tokenizer(), 1024, 8)
    encode = encoder.correct_option if task == "SQuAD" else encoder.options
    return collate([encode(sample) for sample in samples], share_prompt=share_prompt)


def reads_of(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["read_rows"], batch["read_columns"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def textbook_step(
    model: nn.Module,
    closure: Callable[[], Tensor],
    reads: tuple[Tensor, Tensor],
    weight: int,
    length: int,
    kappa: float,
    damping: float,
    kinds: tuple[str, ...] = ("o", "d"),
) -> dict[str, Tensor]:
    """Return the weights after a step, by autograd through the model.

    Later blocks are cut out of the graph: what they write is a constant plus a leaf of its own, so
    a leaf's gradient is that at a matrix's output, by the stream alone.
    """
    blocks, _ = find_blocks(model)
    found = [writers_of(block) for block in blocks[len(blocks) // 2 :]]
    matrices = [each[kind].matrix for each in found for kind in ("o", "d")]
    trained = [each[kind].matrix for each in found for kind in kinds]
    inputs, leaves, logits = {}, {}, []

    def cut(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs[module] = arguments[0].detach()
        leaves[module] = torch.zeros_like(output, requires_grad=True)
        return output.detach() + leaves[module]

    handles = [matrix.register_forward_hook(cut) for matrix in matrices]
    head = model.get_output_embeddings()
    handles.append(head.register_forward_hook(lambda _, __, output: logits.append(output)))
    loss = closure() * weight
    for handle in handles:
        handle.remove()
    of_logits, *of_outputs = torch.autograd.grad(loss, [*logits, *(leaves[m] for m in trained)])
    keys = [*zip(*map(Tensor.tolist, reads), strict=True)]
    positions = sorted(set(keys))
    # The sum over the rows of the head's input that are the same position.
    errors = torch.stack(
        [sum(of_logits[i] for i, key in enumerate(keys) if key == p) for p in positions]
    )
    places = torch.tensor(positions).unbind(1)
    stepped = weights_of(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for matrix, of_output in zip(trained, of_outputs, strict=True):
        x, delta = (at(values, places, length) for values in (inputs[matrix], of_output))
        delta = delta * (errors.square().sum(1) / delta.square().sum(1))[:, None]
        count = len(x)
        gram = x @ x.T / count
        solved = torch.linalg.inv(gram + damping * gram.trace() / count * torch.eye(count)) @ x
        change = -kappa / len(trained) * delta.T @ solved / count
        is_linear = isinstance(matrix, nn.Linear)
        stepped[names[id(matrix.weight)]] += change if is_linear else change.T
    return stepped


def at(values: Tensor, places: tuple[Tensor, Tensor], length: int) -> Tensor:
    if values.dim() == 2:  # OPT's MLP
        values = values.unflatten(0, (-1, length))
    return values[places]


def assert_same_change(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    expected: dict[str, Tensor],
    bound: float = 1e-5,  # log-probabilities are float32
) -> None:
    for name, old in before.items():
        gap, change = (after[name] - expected[name]).norm(), (expected[name] - old).norm()
        assert gap <= bound * change, f"{name}: {float(gap / change):.1e}"


def whole_step(
    model: nn.Module, batch: Batch, objective: Callable[..., Tensor], **settings: Any
) -> dict[str, Tensor]:
    """Return the weights after a step of the optimizer."""
    closure = functools.partial(objective, model, batch)
    optimizer = ErrorBroadcast(model, **settings)
    optimizer.step(closure, weight=weight_of(batch, objective), reads=reads_of(batch))
    return weights_of(model)


def weight_of(batch: Batch, objective: Callable[..., Tensor]) -> int:
    return len(batch["correct" if objective is classification_loss else "targets"])


CASES = [(classification_loss, "CB"), (classification_loss, "Copa"), (language_model_loss, "SQuAD")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("objective", "task"), CASES)
def test_a_step_is_the_textbook_step(
    family: str, objective: Callable[..., Tensor], task: str
) -> None:
    model, batch = model_of(family), batch_of(task)
    before, weight = weights_of(model), weight_of(batch, objective)
    length = batch["input_ids"].shape[1]
    closure = functools.partial(objective, model, batch)
    expected = textbook_step(model, closure, reads_of(batch), weight, length, 0.7, 0.2)
    after = whole_step(model, batch, objective, lr=0.7, damping=0.2)
    assert_same_change(before, after, expected)
    changed = [name for name, tensor in after.items() if (tensor != before[name]).any()]
    assert len(changed) == 4


def test_every_other_family_follows_the_stream() -> None:
    failures = {}
    for family in OTHERS:
        model, batch = model_of(family), batch_of(share_prompt=family not in ("bloom", "mpt"))
        loss = torch.no_grad()(functools.partial(classification_loss, model, batch))
        before = float(loss())
        whole_step(model, batch, classification_loss, lr=0.2)
        after = float(loss())
        if not after < before:
            failures[family] = (before, after)
    assert not failures


def test_the_last_mlp_gets_the_gradient_of_backpropagation() -> None:
    """Up to the length, which is that of the error: a step of -δ̂ changes the logits by -e."""
    for family in ("llama", "opt", "gemma2"):
        model, batch, outputs = model_of(family), batch_of(), []
        optimizer = ErrorBroadcast(model)
        closure = functools.partial(classification_loss, model, batch)
        optimizer.estimate(closure, weight=5, reads=reads_of(batch))
        writer = optimizer.writers[-1]
        errors = optimizer._batches[0][writer][1]
        keep = writer.matrix.register_forward_hook(
            lambda _, __, out, outputs=outputs: outputs.append(out)
        )
        gradient = torch.autograd.grad(closure() * 5, outputs)[0]
        keep.remove()
        places = torch.stack(reads_of(batch)).unique(dim=1)
        gradient = at(gradient, tuple(places), batch["input_ids"].shape[1])
        cosines = nn.functional.cosine_similarity(errors, gradient)
        assert (cosines > 1 - 1e-9).all(), family


def test_whitened_inputs_are_the_inverse_written_out() -> None:
    for shape in ((7, 40), (40, 7), (12, 12), (1, 5)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        gram = x @ x.T / len(x)
        ridge = 0.1 * (x @ x.T).trace() / len(x) ** 2 * torch.eye(len(x))
        torch.testing.assert_close(whitened(x, 0.1), torch.linalg.inv(gram + ridge) @ x)
    assert (whitened(torch.zeros(3, 4), 0.1) == 0).all()
    # Equal rows, and a λ that float32 cannot add to their products.
    rows = torch.randn(9, generator=torch.Generator().manual_seed(0)).expand(100, 9)
    least = rows / rows[0].square().sum()
    torch.testing.assert_close(whitened(rows, 1e-30), least, rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("family", "dtype", "bound"),
    # transformers' Gemma 2 makes NaN of padding in float64.
    [("llama", torch.float64, 1e-5), ("gemma2", torch.float32, 1e-3)],
)
def test_batches_of_an_accumulation_are_one_large_batch(
    family: str, dtype: torch.dtype, bound: float
) -> None:
    for objective, task in ((classification_loss, "CB"), (language_model_loss, "SQuAD")):
        model, batch = model_of(family, dtype), batch_of(task)
        before = weights_of(model)
        expected = whole_step(model, batch, objective)
        model = model_of(family, dtype)
        optimizer = ErrorBroadcast(model)
        for part in (batch_of(task, 0, 3), batch_of(task, 3, 5)):
            closure = functools.partial(objective, model, part)
            optimizer.estimate(closure, weight_of(part, objective), reads_of(part))
        # A batch that another process has.
        optimizer.estimate(closure, 0, reads_of(part))
        optimizer.step()
        assert_same_change(before, weights_of(model), expected, bound)


def test_packed_rows_and_whole_logits_give_the_same_step() -> None:
    for family in ("llama", "opt"):
        before = weights_of(model_of(family))
        expected = whole_step(model_of(family), batch_of("SQuAD"), language_model_loss)
        batch = batch_of("SQuAD", share_prompt=False)
        assert_same_change(
            before, whole_step(model_of(family), batch, language_model_loss), expected
        )
        # A loss of the model's own, without ``reads`` and ``weight``.
        model = model_of(family)
        rows, columns = reads_of(batch)
        targets = batch["targets"]

        def own_loss(model=model, batch=batch, rows=rows, columns=columns, targets=targets):
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return nn.functional.cross_entropy(logits[rows, columns].float(), targets)

        ErrorBroadcast(model).step(own_loss)
        assert_same_change(before, weights_of(model), expected)


def test_a_rate_of_0_moves_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for family in ("opt", "gemma2"):
            model = model_of(family, dtype)
            before = weights_of(model)
            for autocast in {
                False,
                dtype == torch.float32,
            }:  # the update is not of the loss's precision
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    after = whole_step(model, batch_of(), classification_loss, lr=0.0)
                same = all(torch.equal(before[name], after[name]) for name in before)
                assert same, (dtype, family, autocast)


def test_half_precision_rounds_without_bias() -> None:
    """The mean over many seeds is nearer to the float32 step than one unit in the last place."""
    for dtype in (torch.bfloat16, torch.float16):
        start, batch = model_of("llama", dtype, layers=2), batch_of()
        name = "model.layers.1.mlp.down_proj.weight"
        before = weights_of(start)
        exact_model = model_of("llama", torch.float32, layers=2)
        exact_model.load_state_dict(start.float().state_dict())
        exact = whole_step(exact_model, batch, classification_loss, lr=1e-2)[name]
        sums, number = 0.0, 40
        model = model_of("llama", dtype, layers=2)
        for seed in range(number):
            model.load_state_dict(before)
            sums += whole_step(model, batch, classification_loss, lr=1e-2, seed=seed)[name].float()
        change, mean = exact - before[name].float(), sums / number - before[name].float()
        assert float((mean * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.1)
        assert model.dtype == dtype


def test_a_step_takes_so_many_tokens_at_most() -> None:
    batch, kept = batch_of("SQuAD"), []
    for seed in (0, 0, 1):
        optimizer = ErrorBroadcast(model_of("llama"), max_tokens=6, seed=seed)
        closure = functools.partial(language_model_loss, optimizer.model, batch)
        optimizer.estimate(closure, reads=reads_of(batch))
        kept.append(optimizer._batches[0][optimizer.writers[0]][0])
    assert [len(inputs) for inputs in kept] == [6, 6, 6]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_nothing_else_of_the_model_changes() -> None:
    model, batch = model_of("llama"), batch_of()
    model.lm_head.weight.requires_grad_(False)
    frozen = model.model.layers[3].mlp.down_proj.weight.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    optimizer, before, reads = ErrorBroadcast(model), weights_of(model), reads_of(batch)

    def fails() -> Tensor:
        classification_loss(model, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails, reads=reads)
    assert weights_of(model).keys() == before.keys()
    for loss in (torch.nan, torch.inf):
        optimizer.step(lambda x=loss: classification_loss(model, batch) * x, reads=reads)
        assert optimizer.was_skipped
    assert all(torch.equal(before[name], now) for name, now in weights_of(model).items())
    later = model.model.layers[2].mlp.down_proj.weight.requires_grad_(False)
    optimizer.step(lambda: classification_loss(model, batch), reads=reads)
    for layer, weight in ((3, frozen), (2, later)):
        assert torch.equal(before[f"model.layers.{layer}.mlp.down_proj.weight"], weight)
    assert not torch.equal(
        before["model.layers.3.self_attn.o_proj.weight"],
        model.model.layers[3].self_attn.o_proj.weight,
    )
    later.requires_grad_(True)
    assert asked == {name: p.requires_grad for name, p in model.named_parameters()}
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_state_continues_the_run() -> None:
    batch = batch_of()
    first = ErrorBroadcast(model_of("llama", torch.bfloat16))
    torch.optim.lr_scheduler.LinearLR(first)
    closure = functools.partial(classification_loss, first.model, batch)
    first.step(closure, reads=reads_of(batch))
    copied, pickled = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    second = ErrorBroadcast(model_of("llama", torch.bfloat16))
    second.model.load_state_dict(first.model.state_dict())
    closure_of_second = functools.partial(classification_loss, second.model, batch)
    second.estimate(closure_of_second, reads=reads_of(batch))  # loading forgets it
    second.load_state_dict(first.state_dict())
    first.step(closure, reads=reads_of(batch))
    for optimizer in (second, copied, pickled):
        closure = functools.partial(classification_loss, optimizer.model, batch)
        optimizer.step(closure, reads=reads_of(batch))
        pairs = zip(first.model.parameters(), optimizer.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def own_loss(model: nn.Module) -> Tensor:
    ids = torch.arange(8)[None]
    return model(ids, labels=ids).loss


def test_the_stream_is_checked_once_there_is_something_to_compare() -> None:
    """Neither a batch without errors nor weights that are not finite are refused."""
    model = model_of("llama")
    before, optimizer = weights_of(model), ErrorBroadcast(model)
    assert optimizer.step(lambda: own_loss(model) * 0) == 0
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.inf
    optimizer.step(lambda: own_loss(model))
    assert optimizer.was_skipped
    model.load_state_dict(before)
    model.lm_head = copy.deepcopy(model.lm_head)  # as by resize_token_embeddings
    model.model.layers[3].mlp.register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(UnknownStream, match="not the sum"):
        optimizer.step(lambda: own_loss(model))


def test_what_it_cannot_train_is_refused() -> None:
    failures = []
    for family in ("gemma3n", "mamba", "gpt_oss", "recurrent_gemma", "roberta"):
        model = tiny_model(family)
        try:
            ErrorBroadcast(model).step(functools.partial(own_loss, model))
            failures.append(family)
        except UnknownStream as error:
            assert type(model).__name__ in str(error)
    post_norm = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(UnknownStream, match="OPTForCausalLM"):
        ErrorBroadcast(post_norm).step(lambda: own_loss(post_norm))
    assert not failures
    model, ids = model_of("llama"), torch.arange(8)[None]
    closures = {
        "differentiable": torch.no_grad()(lambda: own_loss(model)),
        "number": lambda: own_loss(model).item(),
        "once": lambda: own_loss(model) + own_loss(model),
        "``reads``": lambda: model(ids, logits_to_keep=1).logits.mean(),
        "head once": lambda: model.lm_head(model(ids).logits[..., :32]).mean(),
    }
    for words, closure in closures.items():
        with pytest.raises(ValueError, match=words):
            ErrorBroadcast(model).step(closure)
    settings = {"lr": -1, "damping": 0, "first": 1, "max_tokens": 0, "matrices": ("q",)}
    settings = [*settings.items(), ("lr", torch.inf), ("matrices", ("d", "d"))]
    for name, value in settings:
        with pytest.raises(ValueError, match=name):
            ErrorBroadcast(model, **{name: value})
    with pytest.raises(RuntimeError, match="needs a closure"):
        ErrorBroadcast(model).step()
    for other in (model.model, get_peft_model(model, LoraConfig(target_modules=["o_proj"]))):
        with pytest.raises(UnknownStream, match=type(other).__name__):
            ErrorBroadcast(other)
    dropping = tiny_model("opt", dropout=0.1).train()
    with pytest.raises(UnknownStream, match=r"eval\(\)"):
        ErrorBroadcast(dropping).step(lambda: own_loss(dropping))
