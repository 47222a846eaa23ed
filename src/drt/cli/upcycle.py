"""`drt upcycle`: give a pretrained language model a chunk memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def upcycle(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE", help="Folder with .safetensors files and a tokenizer, or a .gguf file."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the converted model.")
    ],
    lower_layers: Annotated[
        int | None,
        typer.Option(help="Layers of the base below the chunk encoder.", show_default="a third of them"),
    ] = None,
    groups: Annotated[
        int | None, typer.Option(help="Groups of upper layers; each retrieves once.", show_default="2")
    ] = None,
    encoder_layers: Annotated[
        int | None, typer.Option(help="Layers of the chunk encoder.", show_default="2")
    ] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens per chunk.", show_default="63")] = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks retrieved at a time.", show_default="8")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of the sliding attention window.", show_default="512")
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Put in what an earlier run trained on this base (trained.safetensors); it says the sizes.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to measure on.", show_default="a novel that ships"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of the text that are measured.")] = 2048,
) -> None:
    """Convert a pretrained Llama, Mistral or SmolLM2 model into a DRT model.

    Its layers are copied; the memory starts out silent, so the converted model computes what the base does with a
    sliding window. Train it with `drt train` (task: retrieval) before you ask it about a long text.

    Example:

        drt upcycle SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2-drt --lower-layers 10
    """
    # Torch and transformers take seconds to import: not before `--help` and mistyped options are dealt with.
    import json

    import torch
    from transformers.utils import logging

    from drt.data.haystack import load_haystack
    from drt.data.tokens import TextCodec
    from drt.errors import DRTError
    from drt.files import new_folder, write_text
    from drt.models.drt.base_model import load_base
    from drt.models.drt.upcycle import SOURCE_FILE, UpcycleOptions, text_losses
    from drt.models.drt.upcycle import upcycle as convert
    from drt.terminal import PlainConsole, print_table
    from drt.train.adapters import add_lora, load_trained, merge_lora, read_trained

    logging.disable_progress_bar()  # its bars for saving weights would cut into ours
    console = PlainConsole(stderr=True)
    given = {
        "num_lower_layers": lower_layers,
        "num_groups": groups,
        "num_encoder_layers": encoder_layers,
        "chunk_size": chunk_size,
        "retrieval_top_k": top_k,
        "sliding_window": window,
    }
    sizes = {name: value for name, value in given.items() if value is not None}
    file = None if trained is None else read_trained(trained)
    if file is not None and sizes:
        raise DRTError("--trained: the file says the sizes; leave out --lower-layers, --groups and the like")
    options = UpcycleOptions(**sizes) if file is None else file.options
    with console.status("loading the base"):
        model, tokenizer, source = load_base(base)
    codec = TextCodec(tokenizer)
    content = load_haystack([text] if text else None).text[: 16 * tokens]
    ids = torch.from_numpy(codec.encode(content)[:tokens]).long()[None]
    if ids.shape[1] < 2:
        raise DRTError(f"--text {text}: expected a text of at least two tokens")
    with console.status("converting and measuring"):
        converted = convert(model, options, ids, int(codec.encode("\n")[0]))
        if file is not None:
            add_lora(converted, file.lora)
            load_trained(converted, file.tensors, str(trained))
            merge_lora(converted)
        losses = text_losses(model, converted, ids)
    record = {"base": source, "losses": losses._asdict(), "tokens_measured": ids.shape[1]}
    with new_folder(output) as folder:
        converted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(folder / SOURCE_FILE, json.dumps(record, indent=2) + "\n")
    kinds = ("base, full attention", f"base, window of {options.sliding_window}", "converted")
    rows = [(name, f"{loss:.4f}") for name, loss in zip(kinds, losses, strict=True)]
    print_table(["model", "loss (nats per token)"], rows)
    console.print(
        f"{output}: {converted.num_parameters():,} parameters, {model.num_parameters():,} of them from the base"
    )
