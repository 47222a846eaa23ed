"""`drt generate`: continue a text of any length."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drt.errors import DRTError
from drt.machine import MOST_NEW_TOKENS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read a file of any length instead: text, .html or .pdf, plain, .gz or .xz; - is stdin.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the model. Default: the one that ships with drt."),
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Go on after all that an archive holds (drt memory); it is not changed."
        ),
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="With --memory: auto, exact or index, as for drt ask. Default: auto.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_NEW_TOKENS, help="Tokens to generate at most.")
    ] = 100,
    greedy: Annotated[
        bool,
        typer.Option("--greedy/--sample", help="Take the likeliest token each time, or draw one at random."),
    ] = True,
    temperature: Annotated[
        float | None,
        typer.Option(help="With --sample: above 1 is more random, below 1 less; above 0. Default: 1."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="With --sample: draw from the likeliest tokens of this total probability. Default: 1."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**32 - 1, help="With --sample: the same seed draws the same text. Default: 0."
        ),
    ] = None,
    segment_size: Annotated[
        str, typer.Option(metavar="N", help="Tokens read in one pass; more of them take more memory.")
    ] = "4K",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. Default: what the checkpoint holds.")
    ] = None,
) -> None:
    """Continue a text. It may be millions of tokens long: it is read in segments, with a bar on stderr.

    What is generated goes to stdout, word by word as it comes; the text itself is not repeated.

    Examples:

        drt generate "Once upon a time"

        drt generate --file book.txt --max-new-tokens 200

        cat *.py | drt generate --file - --sample --temperature 0.8 --top-p 0.9 --seed 1

        drt generate --memory books.memory "|qx?" --max-new-tokens 5
    """
    sampling = sampling_options(greedy, temperature, top_p, seed)
    if search is not None and memory is None:
        raise DRTError("--search: only with --memory; what a text itself holds is searched exactly")
    text = read_prompt(prompt, file)

    # Torch and transformers take seconds to import: not before `--help` and mistyped options are dealt with.
    import torch
    from transformers import set_seed

    from drt.cli.shared import load_checkpoint, open_archive, parse_length
    from drt.data.tokens import TextCodec
    from drt.models.common.devices import input_device
    from drt.models.drt import DRTCache

    tokens_a_pass = parse_length("--segment-size", segment_size)
    loaded = load_checkpoint(checkpoint, device, dtype)
    model, tokenizer, _ = loaded
    ids = torch.from_numpy(TextCodec(tokenizer).encode(text)).long().to(input_device(model))[None]
    held = None if memory is None else DRTCache.open(open_archive(memory, loaded, search or "auto"), model)
    cache = read_segments(model, ids, tokens_a_pass, held)
    if not greedy:
        set_seed(seed or 0)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        streamer=text_streamer(tokenizer),
        **sampling,
    )


def sampling_options(
    greedy: bool, temperature: float | None, top_p: float | None, seed: int | None
) -> dict[str, Any]:
    """What `model.generate` wants for the command's options.

    Raises:
        DRTError: an option of --sample without it, or a value outside its range.
    """
    if greedy:
        given = {"--temperature": temperature, "--top-p": top_p, "--seed": seed}
        useless = [name for name, value in given.items() if value is not None]
        if useless:
            raise DRTError(f"{', '.join(useless)}: only with --sample; greedy generation draws nothing")
        return {"do_sample": False}
    temperature = 1.0 if temperature is None else temperature
    top_p = 1.0 if top_p is None else top_p
    if not temperature > 0:
        raise DRTError(
            f"--temperature: expected a number above 0, got {temperature}; --greedy is its limit at 0"
        )
    if not 0 < top_p <= 1:
        raise DRTError(f"--top-p: expected a probability in (0, 1], got {top_p}")
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def read_prompt(prompt: str | None, file: Path | None) -> bytes:
    """The text to continue, as UTF-8.

    Raises:
        DRTError: neither or both are given, the file cannot be read, the text is empty or not UTF-8.
    """
    from drt.data.text_files import check_text, read_text

    if (prompt is None) == (file is None):
        raise DRTError("expected either a PROMPT or --file FILE; see drt generate --help")
    if file is not None and str(file) != "-":
        return read_text(file)
    text = sys.stdin.buffer.read() if prompt is None else prompt.encode("utf-8", errors="surrogateescape")
    if not text:
        raise DRTError("the prompt is empty; expected at least one character")
    check_text(text, "the prompt" if file is None else str(file))
    return text


def text_streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """Writes what is generated to standard output as it comes."""
    from transformers import TextStreamer

    from drt.terminal import say

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text, end="\n" if stream_end else "")

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def read_segments(
    model: PreTrainedModel, ids: Tensor, segment_size: int, cache: Cache | None = None
) -> Cache | None:
    """Read all but the last token of a prompt, with a bar on stderr; `generate` reads the last one itself.

    Args:
        model: in eval mode.
        ids: (1, L) int64, on the model's device.
        segment_size: tokens in one forward pass.
        cache: what the model remembers already.

    Returns:
        What the model remembers; None where that is nothing.
    """
    from drt.cli.shared import reading_progress
    from drt.models.reading import read_text

    with reading_progress() as progress:
        task = progress.add_task("", total=ids.shape[1])
        cache = read_text(
            model, ids[:, :-1], segment_size, cache, lambda count: progress.advance(task, count)
        )
        progress.advance(task, 1)
    return cache
