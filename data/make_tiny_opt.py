"""Pre-train the bundled tiny OPT from nothing, with ordinary first-order AdamW.

    python data/make_tiny_opt.py

trains a byte-level BPE tokenizer and an OPT of about 0.9 million parameters on the invented texts
of tiny_corpus.py and writes both to `data/tiny-opt` in Hugging Face format. It takes a few minutes
on two cores and ends with the held-out zero-shot accuracy on the bundled SST2 samples.

Everything is seeded. The same machine with the same number of threads and the same library versions
should write the same weights; another processor or another torch adds floating-point numbers in
another order, so its weights, and the last digit or two of its accuracy, differ.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from make_data import make_task
from sample_sentences import Row
from tiny_corpus import make_corpus, question_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

BOS, PAD, UNKNOWN = "</s>", "<pad>", "<unk>"
MAX_POSITIONS = 1024
TOKENS_PER_BATCH = 2048
TEXTS_PER_BATCH = 32
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
IGNORE = -100


def train_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that, like OPT's, begins every text with `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<s>", PAD, BOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """An untrained OPT in the shape of the large ones, with pre-layer norms and tied embeddings."""
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        activation_function="relu",
        init_std=0.03,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OPTForCausalLM(config)


def make_batches(rng: random.Random, encoded: list[list[int]]) -> list[list[list[int]]]:
    """Batches of texts of like length, in random order; short texts come in small batches."""
    batches: list[list[list[int]]] = []
    batch: list[list[int]] = []
    for tokens in sorted(encoded, key=lambda tokens: (len(tokens), rng.random())):
        fits = (len(batch) + 1) * len(tokens) <= TOKENS_PER_BATCH
        if batch and (not fits or len(batch) == TEXTS_PER_BATCH):
            batches.append(batch)
            batch = []
        batch.append(tokens)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def learning_rate(progress: float) -> float:
    """Linear warm-up over the first 4%, then a cosine down to a twentieth."""
    if progress < 0.04:
        return PEAK_LEARNING_RATE * progress / 0.04
    decay = (1 + math.cos(math.pi * (progress - 0.04) / 0.96)) / 2
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * decay)


def language_model_loss(model: OPTForCausalLM, batch: list[list[int]]) -> torch.Tensor:
    """Mean loss of the next token over the tokens of a batch that are not padding."""
    tokens = [torch.tensor(text) for text in batch]
    inputs = pad_sequence(tokens, batch_first=True, padding_value=model.config.pad_token_id)
    targets = pad_sequence(tokens, batch_first=True, padding_value=IGNORE)
    mask = (targets != IGNORE).long()
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE)


def pretrain(
    model: OPTForCausalLM, batches: list[list[list[int]]], minutes_between_prints: float = 0.25
) -> None:
    """One pass over the batches, printing the mean loss since the last line."""
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    plain = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    losses: list[float] = []
    start = printed = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / len(batches))
        optimizer.zero_grad()
        loss = language_model_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        now = time.monotonic()
        if now - printed > 60 * minutes_between_prints or step == len(batches):
            mean = sum(losses) / len(losses)
            print(f"step {step}/{len(batches)}  loss {mean:.3f}  {now - start:.0f} s", flush=True)
            losses, printed = [], now


@torch.no_grad()
def option_score(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, option: str
) -> float:
    """Mean log-probability of the option's tokens after the prompt."""
    prompt_length = len(tokenizer(prompt.rstrip(" ")).input_ids)
    tokens = torch.tensor([tokenizer(prompt + option).input_ids])
    log_probabilities = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    scores = log_probabilities.gather(1, tokens[0, 1:, None])
    return scores[prompt_length - 1 :].mean().item()


def zero_shot_accuracy(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, rows: list[Row]
) -> float:
    """Share of the rows whose right option has the largest mean log-probability."""
    correct = 0
    for row in rows:
        question = question_of(task, row)
        scores = [
            option_score(model, tokenizer, question.prompt, option) for option in question.options
        ]
        correct += scores.index(max(scores)) == question.answer
    return correct / len(rows)


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "tiny-opt",
        help="folder to write the model into (default: tiny-opt, here)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of corpus, weights and batches (default: 0)"
    )
    parser.add_argument(
        "--samples_seed",
        type=int,
        default=0,
        help="seed that make_data.py was run with; its rows stay out of the corpus (default: 0)",
    )
    parser.add_argument(
        "--num_texts", type=int, default=50_000, help="texts in the corpus (default: 50000)"
    )
    parser.add_argument(
        "--vocabulary_size", type=int, default=1536, help="tokens at most (default: 1536)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    return parser.parse_args()


def main() -> None:
    """Corpus, tokenizer, model, training, files, and the accuracy that the demo starts from."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(f"batches-{arguments.seed}")
    texts = make_corpus(arguments.num_texts, arguments.seed, arguments.samples_seed)
    tokenizer = train_tokenizer(texts, arguments.vocabulary_size)
    encoded = [tokens[:MAX_POSITIONS] for tokens in tokenizer(texts, verbose=False).input_ids]
    batches = make_batches(rng, encoded)
    model = new_model(tokenizer)
    print(
        f"{len(texts)} texts, {sum(map(len, encoded))} tokens, {len(tokenizer)} in the vocabulary, "
        f"{model.num_parameters()} parameters, {len(batches)} batches"
    )
    pretrain(model, batches)
    model.eval()
    save(model, tokenizer, arguments.output)
    rows = make_task("sst2", arguments.samples_seed)["validation"]
    accuracy = zero_shot_accuracy(model, tokenizer, "sst2", rows)
    print(f"held-out SST2, zero-shot: {accuracy:.3f} of {len(rows)}; saved to {arguments.output}")


if __name__ == "__main__":
    main()
