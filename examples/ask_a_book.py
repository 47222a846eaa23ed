"""Read a text once, keep its memory, ask it from anywhere, and add to it: the archive through the library.

    python examples/ask_a_book.py book.txt book.memory

Hides two needles in the text, reads it into an archive, opens that again and asks; then a conversation on the live
cache: something is said, asked for and traced; at last a second document is appended. Without arguments the text is a
part of the sample that ships, and all files go to a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LogitsProcessorList

from drt.data.haystack import load_haystack
from drt.eval.questions import ask
from drt.eval.retrieval import RetrievalTrace
from drt.files import write_text
from drt.machine import keep_freed_memory
from drt.memory import Archive, ArchiveWriter, verify_archive
from drt.models.drt import DRTCache
from drt.models.drt.archive_drt import describe_archive, read_documents
from drt.models.loading import load_model, shipped_checkpoint
from drt.plotting.retrieval import retrieval_page
from drt.terminal import program


def main(text: bytes, folder: Path) -> None:
    """Run the example.

    Args:
        text: UTF-8.
        folder: where everything is written; made if it is missing.
    """
    torch.set_grad_enabled(False)
    keep_freed_memory()  # reads faster; a choice for the whole process
    model, tokenizer = load_model(shipped_checkpoint())
    folder.mkdir(parents=True, exist_ok=True)
    book, sequel, archive = folder / "book.txt", folder / "sequel.txt", folder / "book.memory"
    middle = text.index(b" ", len(text) // 2)
    book.write_bytes(text[:middle] + b" |qx=48213| " + text[middle:])
    sequel.write_bytes(b"What happened then: |ab=12345| was all that was said of it.")

    # Read the book. The archive is whole however this ends; run again it goes on.
    description = describe_archive(model, tokenizer, model_name="needle-tiny")
    with ArchiveWriter.create(archive, description) as writer:
        read_documents(model, tokenizer, writer, [book])

    # Any later process: open it and ask, several questions at once.
    with Archive.open(archive) as memory:
        answers = ask(model, tokenizer, memory, ["|qx?", "Chapter 2. |qx?"], max_new_tokens=5)
        for answer in answers:
            best = answer.records[0]
            print(f"{answer.question} {answer.text}: from {best.document}, byte {best.start:,}")
        page = retrieval_page(answers, {"memory": str(archive)})
        write_text(folder / "page.html", page)

        # A conversation: the cache goes on after the book; what is said stays in RAM, the archive is as it was.
        cache = DRTCache.open(memory, model)
        said = tokenizer.encode("It is told that |zz=77031| in the north.", add_special_tokens=False)
        model(torch.tensor([said]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for question in ("|zz?", "|qx?"):
            ids = torch.tensor([tokenizer.encode(question, add_special_tokens=False)])
            past = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
            trace = RetrievalTrace(cache)
            output = model.generate(
                ids,
                attention_mask=past,
                past_key_values=cache,
                max_new_tokens=5,
                do_sample=False,
                logits_processor=LogitsProcessorList([trace]),
            )
            chunks = trace.selections[-1].chunk_indices[0].tolist()
            print(
                f"{question} {tokenizer.decode(output[0, ids.shape[1] :])}: chunks {chunks} of {memory.num_chunks}"
            )

    # Append: readers see the archive as it was until this has finished.
    with ArchiveWriter.open(archive) as writer:
        read_documents(model, tokenizer, writer, [sequel])
    with Archive.open(archive) as memory:
        for answer in ask(model, tokenizer, memory, ["|ab?", "|qx?"], max_new_tokens=5):
            print(f"{answer.question} {answer.text}")
    print(verify_archive(archive) or "the archive is whole")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "text", nargs="?", metavar="TEXT", help="UTF-8 text; default: a part of the sample that ships"
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER", help="for all files; default: temporary"
    )
    arguments = parser.parse_args()
    with program(), tempfile.TemporaryDirectory() as temporary:
        text = load_haystack([arguments.text] if arguments.text else None).text
        main(text if arguments.text else text[:30_000], arguments.folder or Path(temporary))
