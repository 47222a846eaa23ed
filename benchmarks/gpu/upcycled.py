"""What a converted and trained model remembers: needles in RULER's wording, and what its memory is worth to plain text.

    python benchmarks/gpu/upcycled.py MODEL TEXT [--samples 20] [--json results.jsonl]

TEXT is JSON lines with a field `text`, or a text file; it should not be in the training data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from drt.data.sources import Source, read_documents
from drt.data.tokens import TextCodec
from drt.files import write_text
from drt.layers.grouped_cross_attention import GroupedCrossAttention
from drt.models.drt import DRTForCausalLM
from drt.models.loading import load_model
from drt.models.reading import read_text

ADJECTIVES = ["abrasive", "amber", "brave", "clever", "dusty", "eager", "gentle", "hollow", "jolly", "lively"]
NOUNS = ["anchor", "basket", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket"]
INSTRUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
NEEDLE = " One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
BATCH = 8  # texts read together
ANSWER_TOKENS = 12
ROOM = 80  # tokens left for needles and the question


def main() -> None:
    """Print a line per test; with --json also write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text")
    parser.add_argument("--samples", type=int, default=20, help="questions per test")
    parser.add_argument("--lengths", default="4096,32768,131072", help="tokens of the texts with needles")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded, tokenizer = load_model(options.model, torch.bfloat16)
    assert isinstance(loaded, DRTForCausalLM), "expected a DRT model"
    model = loaded.to(options.device)
    codec = TextCodec(tokenizer)
    text = codec.encode(b"\n\n".join(document.text for document in read_documents(Source(path=options.text))))
    records = [
        memory_value(model, text, length, rows)
        for length, rows in ((8192, 16), (65536, 3))
        if length * rows < len(text)
    ]
    for length in map(int, options.lengths.split(",")):
        for needles in (1, 4):
            records.append(find_needles(model, codec, text, length, needles, options.samples))
    if options.json:
        write_text(options.json, "".join(json.dumps(record) + "\n" for record in records))


def find_needles(
    model: DRTForCausalLM, codec: TextCodec, text: np.ndarray, length: int, needles: int, samples: int
) -> dict[str, object]:
    """Hide needles at even depths, one of them asked for; greedy answers that hold the right number count."""
    rng = np.random.default_rng([length, needles])
    right = 0
    for first in range(0, samples, BATCH):
        made = [
            make_sample(codec, text, length, needles, (number + 0.5) / samples, rng)
            for number in range(first, min(first + BATCH, samples))
        ]
        shortest = min(len(ids) for ids, _, _ in made)
        rows = torch.from_numpy(np.stack([ids[-shortest:] for ids, _, _ in made])).long()
        answers = continue_rows(model, codec, rows, [question for _, question, _ in made])
        right += sum(value in answer for (_, _, value), answer in zip(made, answers, strict=True))
    record = {"test": "needles", "length": length, "needles": needles, "right": right, "of": samples}
    print(record, flush=True)
    return record


def make_sample(
    codec: TextCodec, text: np.ndarray, length: int, needles: int, depth: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, str]:
    """Token ids of a text with needles and of the question, and the right answer."""
    pairs = rng.permutation(len(ADJECTIVES) * len(NOUNS))[:needles].tolist()
    keys = [f"{ADJECTIVES[pair // len(NOUNS)]}-{NOUNS[pair % len(NOUNS)]}" for pair in pairs]
    values = [str(value) for value in rng.integers(10**6, 10**7, needles)]
    sentences = [
        codec.encode(NEEDLE.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)
    ]
    opening = codec.encode(INSTRUCTION)
    room = length - len(opening) - sum(map(len, sentences)) - ROOM
    start = int(rng.integers(len(text) - room))
    places = np.concatenate([[depth], rng.random(needles - 1)])
    parts, last = [opening], 0
    for number in np.argsort(places):
        place = int(places[number] * room)
        parts += [text[start + last : start + place], sentences[number]]
        last = place
    parts.append(text[start + last : start + room])
    return np.concatenate(parts), codec.encode(QUESTION.format(key=keys[0])), values[0]


@torch.no_grad()
def continue_rows(
    model: DRTForCausalLM, codec: TextCodec, rows: Tensor, questions: list[np.ndarray]
) -> list[str]:
    """Read rows, ask each its question, and continue greedily."""
    cache = read_text(model, rows, max(2048, 131072 // len(rows)))
    width = max(map(len, questions))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        ids[row, width - len(question) :] = torch.from_numpy(question)
        mask[row, width - len(question) :] = 1
    ends = torch.zeros(ids.shape, dtype=torch.bool)
    ends[:, -1] = True
    output = model(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        chunk_ends=ends,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    tokens = [output.logits[:, -1].argmax(-1)]
    for _ in range(ANSWER_TOKENS - 1):
        output = model(tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1].argmax(-1))
    return [codec.decode(answer).decode("utf-8", "replace") for answer in torch.stack(tokens, 1).tolist()]


@torch.no_grad()
def memory_value(model: DRTForCausalLM, text: np.ndarray, length: int, rows: int) -> dict[str, object]:
    """The loss of plain text, with the memory and with grouped cross-attention silenced."""
    own = mean_loss(model, text, length, rows)
    attentions = [module for module in model.modules() if isinstance(module, GroupedCrossAttention)]
    kept = [module.o_proj.weight.clone() for module in attentions]
    for module in attentions:
        module.o_proj.weight.zero_()
    silenced = mean_loss(model, text, length, rows)
    for module, weight in zip(attentions, kept, strict=True):
        module.o_proj.weight.copy_(weight)
    record = {"test": "text", "length": length, "rows": rows, "loss": own, "loss_without_memory": silenced}
    print(record, flush=True)
    return record


def mean_loss(model: DRTForCausalLM, text: np.ndarray, length: int, rows: int) -> float:
    """Nats per token of the first rows of a text."""
    losses = []
    for row in range(rows):
        ids = torch.from_numpy(text[row * length : (row + 1) * length].astype(np.int64)).to(model.device)
        states = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        for first in range(0, length - 1, 2048):
            part = slice(first, min(first + 2048, length - 1))
            logits = model.lm_head(states[part]).float()
            losses.append(F.cross_entropy(logits, ids[1:][part], reduction="sum"))
    return float(torch.stack(losses).sum()) / (rows * (length - 1))


if __name__ == "__main__":
    main()
