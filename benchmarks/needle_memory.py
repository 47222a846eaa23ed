"""What a smaller memory and a search by index cost: the same needles asked of archives that hold the same text.

    python benchmarks/needle_memory.py --lengths 16K,64K --tasks single,multikey,multihop --samples 50 \\
        --json needle_memory.jsonl

Each text is read once into an archive in float32. It is then asked, and so are copies of it in bfloat16 and int8, and
itself through an index of its landmarks (`drt memory index`), with the model that ships.

- found: of so many samples, the answers whose every token is right.
- same: the answers that are those of float32 searched exactly.
- recall: of the chunks that the question's groups read there, the share that they read here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from common import Report, lengths, parser

from drt.data.needles import TASKS, NeedleSample, load_haystack
from drt.data.tokens import TextCodec
from drt.eval.needle import NeedlePlan
from drt.eval.questions import ask
from drt.eval.retrieval import Answer
from drt.memory import Archive, ArchiveWriter
from drt.models.drt import DRTCache
from drt.models.drt.archive_drt import describe_archive, read_documents
from drt.models.loading import load_model, shipped_checkpoint

MEMORIES = ("float32", "bfloat16", "int8", "index")


def main() -> None:
    """Parse, ask every sample of every memory, show a table."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=lengths, default="16K,64K", help="tokens (default: %(default)s)")
    options.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    options.add_argument(
        "--samples", type=int, default=50, help="of a task and length (default: %(default)s)"
    )
    options.add_argument("--seed", type=int, default=7, help="of the needles (default: %(default)s)")
    options.add_argument("--haystack", type=Path, action="append", help="default: the sample that ships")
    options.add_argument("--folder", type=Path, help="where archives are made; default: a temporary folder")
    arguments = options.parse_args()
    report = Report("needle_memory", arguments)
    model, tokenizer = load_model(shipped_checkpoint())
    haystack = load_haystack(arguments.haystack)
    plan = NeedlePlan(
        tasks=tuple(arguments.tasks.split(",")),
        lengths=tuple(arguments.lengths),
        samples=arguments.samples,
        seed=arguments.seed,
    )
    for length in plan.lengths:
        for task in plan.tasks:
            answers: dict[str, list[Answer]] = {memory: [] for memory in MEMORIES}
            samples = [plan.make_sample((task, length, n), tokenizer, haystack) for n in range(plan.samples)]
            for sample in samples:
                with TemporaryDirectory(dir=arguments.folder) as folder:
                    for memory, answer in ask_all(model, tokenizer, sample, Path(folder)).items():
                        answers[memory].append(answer)
            for memory in MEMORIES:
                report.add(
                    task=task,
                    length=length,
                    memory=memory,
                    samples=len(samples),
                    **compare(samples, answers[memory], answers["float32"]),
                )
    report.finish("length", "memory", {"found": "needles found"})


def ask_all(model: Any, tokenizer: Any, sample: NeedleSample, folder: Path) -> dict[str, Answer]:
    """Read a sample's text once, and ask its question of every memory."""
    codec = TextCodec(tokenizer)
    text = folder / "text.txt"
    prompt = codec.decode(sample.input_ids).decode(errors="ignore")
    text.write_text(prompt.removesuffix(sample.question), encoding="utf-8")
    description = describe_archive(model, tokenizer, model_name="benchmark", dtype="float32")
    with ArchiveWriter.create(folder / "float32", description) as writer:
        read_documents(model, tokenizer, writer, [text])
        writer.index()
    answers = {}
    for memory in MEMORIES:
        path = folder / ("float32" if memory == "index" else memory)
        if not path.exists():
            with Archive.open(folder / "float32") as archive:
                DRTCache.open(archive, model).save(path, replace(description, dtype=memory))
        with Archive.open(path) as archive:
            archive.search = "index" if memory == "index" else "exact"
            (answers[memory],) = ask(model, tokenizer, archive, [sample.question], len(sample.answer_ids))
    return answers


def compare(samples: list[NeedleSample], answers: list[Answer], plain: list[Answer]) -> dict[str, Any]:
    """How answers fare, and how like the plain ones they are."""
    pairs = list(zip(answers, plain, strict=True))
    return {
        "found": sum(answer.text == sample.expected for answer, sample in zip(answers, samples, strict=True)),
        "same": sum(answer.text == other.text for answer, other in pairs),
        "recall": mean(len(read(answer) & read(other)) / len(read(other)) for answer, other in pairs),
    }


def read(answer: Answer) -> set[tuple[int, int]]:
    """What the groups read at the end of the question."""
    return {(record.group, record.chunk) for record in answer.records if record.step == 0}


if __name__ == "__main__":
    main()
