"""`drt memory`: read documents once and keep what a model remembers of them in a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drt.errors import DRTError, Interrupted
from drt.files import describe_kind
from drt.terminal import print_table, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drt.cli.shared import LoadedModel
    from drt.memory import Archive, ArchiveDescription, ArchiveWriter

memory = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")

FilesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        help="Texts of any length, .html and .pdf, plain, .gz or .xz, and folders of them, read in this order.",
    ),
]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the archive.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the model. Default: the one that ships with drt."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]

NOT_WHOLE = 1  # exit code of verify
DTYPES = ("bfloat16", "float32", "float16", "int8")
NAMES = 3  # documents named in one message


@memory.callback()
def root() -> None:
    """Read documents once, keep what a model remembers of them in a folder, and ask it questions with drt ask."""


@memory.command()
def build(
    files: FilesArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the archive; made if it is missing."),
    ],
    checkpoint: CheckpointOption = None,
    dtype: Annotated[
        str, typer.Option(help="How keys and values are kept: bfloat16, float32, float16 or int8.")
    ] = "bfloat16",
    segment_size: Annotated[
        str, typer.Option(metavar="N", help="Tokens read in one pass; more of them take more memory.")
    ] = "4K",
    device: DeviceOption = "auto",
) -> None:
    """Read documents and keep what the model remembers of them.

    The archive holds the texts too, so it can be copied to another machine as it is. After Ctrl-C the same command goes
    on from there, after a kill from the last commit; where nothing is left to do it says so. A text that has changed
    since is refused.

    Examples:

        drt memory build book.txt -o book.memory

        drt memory build volume-1.txt volume-2.txt -o books.memory --checkpoint runs/my-model/final
    """
    # Torch and transformers take seconds to import: not before `--help` and mistyped options are dealt with.
    sizes = find_texts(files, output)

    from drt.cli.shared import check_maker, load_checkpoint, parse_length
    from drt.memory.archive_writer import ArchiveWriter
    from drt.models.drt.archive_drt import describe_archive

    tokens_a_pass = parse_length("--segment-size", segment_size)
    if dtype not in DTYPES:
        raise DRTError(f"--dtype: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    loaded = load_checkpoint(checkpoint, device)
    description = describe_archive(
        loaded.model, loaded.tokenizer, model_name=loaded.name, dtype=dtype, segment_size=tokens_a_pass
    )
    begun = is_begun(output)
    with ArchiveWriter.open(output) if begun else ArchiveWriter.create(output, description) as archive:
        check_maker(loaded, archive)
        check_settings(archive, description)
        if archive.finished:
            check_complete(archive, list(sizes))
            say(f"{output} is complete: {describe_size(archive)}")
        else:
            read_files(loaded, archive, sizes)


@memory.command()
def append(
    folder: FolderArgument,
    files: FilesArgument,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Read more documents into an archive, after those that it holds.

    Whoever asks the archive meanwhile sees it as it was before. After Ctrl-C the same command resumes from there, after
    a kill from the last commit; drt memory rollback drops what it has read instead.

    Example:

        drt memory append book.memory sequel.txt
    """
    sizes = find_texts(files, folder)

    from drt.cli.shared import check_maker, load_checkpoint
    from drt.memory.archive_writer import ArchiveWriter
    from drt.models.drt.archive_sources import find_held

    with ArchiveWriter.open(folder) as archive:
        unfinished = archive.unfinished_documents
        again = [str(path) for path in sizes if find_held(archive, path) not in (None, *unfinished)]
        if again:
            raise DRTError(f"{folder} holds {list_names(again)} already: {describe_size(archive)}")
        loaded = load_checkpoint(checkpoint, device)
        check_maker(loaded, archive)
        read_files(loaded, archive, sizes)


@memory.command()
def rollback(folder: FolderArgument) -> None:
    """Drop what an unfinished append or build has read, for one that cannot be resumed.

    The archive is then as it was when it was last finished, which is what drt ask has seen all along. Where no build
    has ever finished nothing is left, and another can be made in its place.

    Example:

        drt memory rollback book.memory
    """
    from drt.memory.archive import MANIFEST
    from drt.memory.archive_writer import ArchiveWriter
    from drt.memory.manifest import Manifest

    before = Manifest.load(folder / MANIFEST).head.tokens
    with ArchiveWriter.rollback(folder) as archive:
        dropped = before - archive.num_tokens
        did = f"dropped {dropped:,} tokens" if dropped else "nothing is unfinished"
        say(f"{folder}: {did}; it holds {describe_size(archive)}")


@memory.command()
def info(
    folder: FolderArgument,
    json: Annotated[bool, typer.Option("--json", help="Show it as one JSON object.")] = False,
) -> None:
    """Show what an archive holds, what it was made by, and how large it is."""
    from json import dumps

    from drt.memory.archive import Archive

    with Archive.open(folder) as archive:
        facts = archive_facts(archive)
    if json:
        say(dumps(facts))
    else:
        show_facts(facts)


@memory.command()
def index(folder: FolderArgument) -> None:
    """Index the landmarks of an archive, so that a question need not score every chunk of it.

    drt ask uses it where it covers a million chunks or more; below that an exact search is as good as instant. It finds
    most of the best chunks, not surely all: drt ask --search exact does without it. Chunks that are appended later are
    scored one by one until the archive is indexed again. Wants faiss: pip install faiss-cpu.

    Example:

        drt memory index library.memory
    """
    from drt.cli.shared import bytes_progress
    from drt.memory.archive_writer import ArchiveWriter
    from drt.memory.manifest import DATA_FILES

    with ArchiveWriter.open(folder) as archive, bytes_progress("indexing") as progress:
        size = archive.num_bytes[DATA_FILES[1]]
        task = progress.add_task("", total=size)
        archive.index(lambda count: progress.advance(task, size * count / archive.num_chunks))
        say(f"{folder}: {archive.num_indexed:,} chunks are indexed")


@memory.command()
def verify(folder: FolderArgument) -> None:
    """Read every byte of an archive and compare it with its checksums.

    The exit code is 0 only for a whole archive. Otherwise all that is damaged, missing or unfinished is named, a line
    each, and the exit code is 1; it is 2 where there is no such folder.
    """
    from drt.cli.shared import bytes_progress
    from drt.memory.approximate_index import INDEX_FILE
    from drt.memory.archive_verify import verify_archive
    from drt.memory.manifest import DATA_FILES

    if not folder.is_dir():
        raise DRTError(f"{folder}: expected the folder of an archive, got {describe_kind(folder)}")
    files = [path for path in folder.glob("*") if path.name in (*DATA_FILES, INDEX_FILE)]
    total = sum(path.lstat().st_size for path in files)
    with bytes_progress("checking") as progress:
        task = progress.add_task("", total=total)
        problems = verify_archive(folder, lambda count: progress.advance(task, count))
    for problem in problems:
        say(problem)
    if problems:
        raise typer.Exit(NOT_WHOLE)
    say(f"{folder} is whole")


def find_texts(files: Sequence[Path], folder: Path) -> dict[Path, int]:
    """The texts that files and folders are, each with its size in bytes, before hours go into the first.

    An archive that lies in a folder of texts is none of them.

    Raises:
        DRTError: as `drt.data.text_files.text_files`; where an unfinished archive waits for the files it says how to go
            on without them.
    """
    from drt.data.text_files import text_files

    try:
        sizes = text_files(files)
        archive = folder.resolve()
        return {
            path: size
            for path, size in sizes.items()
            if path in files or not path.resolve().is_relative_to(archive)
        }
    except DRTError as error:
        from drt.memory.archive import MANIFEST
        from drt.memory.manifest import Manifest

        try:
            manifest = Manifest.load(folder / MANIFEST)
        except DRTError:
            raise error from None
        if manifest.head == manifest.finished:
            raise
        raise DRTError(
            f"{error}. {folder} is unfinished; to drop what it has read: drt memory rollback {folder}"
        ) from error


def is_begun(folder: Path) -> bool:
    """Whether there is an archive to which something was committed.

    Raises:
        DRTError: there is one, but damaged.
    """
    from drt.memory.archive import MANIFEST
    from drt.memory.manifest import Manifest

    return (folder / MANIFEST).exists() and Manifest.load(folder / MANIFEST).head.segments > 0


def check_complete(archive: Archive, files: Sequence[Path]) -> None:
    """Make sure that a finished archive holds these files, in this order and as they are now.

    Raises:
        DRTError: it holds others, or another text of a file.
    """
    from drt.models.drt.archive_sources import find_held, has_name

    documents = archive.documents
    if len(documents) != len(files) or not all(map(has_name, documents, files)):
        names = list_names([document.name for document in documents])
        raise DRTError(f"{archive.path} holds {names}; drt memory append adds documents to it")
    for path in files:
        if find_held(archive, path) is None:
            raise DRTError(
                f"{archive.path} holds another text of the name {path}: the file has changed since it was read, or is "
                "another one. Build another archive, or add it with drt memory append"
            )


def check_settings(archive: Archive, wanted: ArchiveDescription) -> None:
    """Make sure that an archive was begun with these options.

    Raises:
        DRTError: with others; says which.
    """
    for option, name in (("--dtype", "dtype"), ("--segment-size", "segment_size")):
        held, got = getattr(archive.description, name), getattr(wanted, name)
        if held != got:
            raise DRTError(f"{archive.path} was begun with {option} {held}, got {got}")


def read_files(loaded: LoadedModel, archive: ArchiveWriter, sizes: Mapping[Path, int]) -> None:
    """Read files, of texts of these sizes in bytes, into an archive with a bar on stderr; say what it then holds.

    Raises:
        Interrupted: Ctrl-C; the archive is whole up to its last commit.
    """
    from drt.cli.shared import reading_progress
    from drt.data.tokens import TextCodec
    from drt.models.drt.archive_drt import read_documents

    known = sum(document.num_tokens for document in archive.unfinished_documents)
    with reading_progress() as progress:
        total = sum(sizes.values()) if TextCodec(loaded.tokenizer).is_bytes else None
        task = progress.add_task("", total=total, completed=known)

        def advance(count: int) -> None:
            nonlocal known  # what an earlier run has read is told first, and is not part of the speed
            skipped = min(known, count)
            known -= skipped
            progress.advance(task, count - skipped)

        try:
            read_documents(loaded.model, loaded.tokenizer, archive, list(sizes), advance)
        except KeyboardInterrupt as interrupt:
            if archive.num_segments == 0:
                raise Interrupted("stopped before anything was read") from interrupt
            raise Interrupted(
                f"stopped; {archive.path} keeps {describe_size(archive)}. Run the same command again to resume."
            ) from interrupt
    say(f"{archive.path}: {describe_size(archive)}")


def list_names(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")


def describe_size(archive: Archive) -> str:
    """How much an archive holds, in words."""
    documents, size = len(archive.documents), sum(archive.num_bytes.values())
    plural = "" if documents == 1 else "s"
    return f"{archive.num_tokens:,} tokens of {documents} document{plural} in {size / 1e6:,.1f} MB"


def archive_facts(archive: Archive) -> dict[str, Any]:
    """What `drt memory info` tells."""
    size = sum(archive.num_bytes.values())
    indexed, index_problem = 0, None
    try:
        indexed = archive.num_indexed
    except DRTError as error:  # all else is there to be told
        index_problem = str(error)
    return {
        "path": str(archive.path),
        "tokens": archive.num_tokens,
        "chunks": archive.num_chunks,
        "bytes": size,
        "bytes_per_token": size / max(archive.num_tokens, 1),
        "files": archive.num_bytes,
        "indexed": indexed,
        "index_problem": index_problem,
        "unfinished": not archive.finished,
        "description": asdict(archive.description),
        "documents": [asdict(document) for document in archive.documents],
    }


def show_facts(facts: dict[str, Any]) -> None:
    """Print the facts as a list and a table of the documents."""
    made_by = facts["description"]
    lines = {
        "archive": facts["path"],
        "model": f"{made_by['model_name']} ({made_by['model_fingerprint'][:12]})",
        "holds": f"{facts['tokens']:,} tokens in {facts['chunks']:,} chunks of at most {made_by['chunk_size']}",
        "size": f"{facts['bytes'] / 1e6:,.1f} MB, {facts['bytes_per_token']:,.1f} bytes a token, in {made_by['dtype']}",
    }
    if facts["indexed"]:
        lines["index"] = f"of {facts['indexed']:,} chunks"
    if facts["index_problem"]:
        lines["index"] = facts["index_problem"]
    if facts["unfinished"]:
        lines["unfinished"] = (
            "an append was interrupted; run the same append again to resume, or drop what it has read: "
            f"drt memory rollback {facts['path']}"
        )
    for name, line in lines.items():
        say(f"{name:<11}{line}")
    rows = []
    for document in facts["documents"]:
        first, count = document["first_chunk"], document["num_chunks"]
        numbers = (document["num_tokens"], document["num_bytes"], first, first + count)
        rows.append((document["name"], *(f"{number:,}" for number in numbers)))
    print_table(("document", "tokens", "bytes", "chunks from", "to"), rows)
