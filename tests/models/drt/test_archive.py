"""Archives of a model's memory: what is read from one equals what reading the text anew gives."""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from drt.data.token_stream import TokenStream
from drt.errors import DRTError
from drt.memory import Archive, ArchiveWriter, ChunkStore, DeviceStore, HostStore, verify_archive
from drt.memory.manifest import DATA_FILES
from drt.models.drt import DRTCache, DRTForCausalLM
from drt.models.drt.archive_drt import describe_archive, read_documents
from drt.models.drt.chunk_layout import upper_reach
from drt.models.drt.fingerprint import model_fingerprint

TEXT = "".join(f"line {n}: {n * n % 1009}\n" for n in range(60)).encode()


@pytest.fixture(scope="module")
def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture
def model(make_model: Callable[..., DRTForCausalLM]) -> DRTForCausalLM:
    return make_model(vocab_size=259)


def write(folder: Path, **texts: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return [folder / name for name in texts]


def build(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, path: Path, files: list[Path], dtype: str = "float32"
) -> Path:
    description = describe_archive(model, tokenizer, model_name="small", dtype=dtype, segment_size=60)
    with ArchiveWriter.create(path, description) as writer:
        read_documents(model, tokenizer, writer, files, commit_tokens=100)
    return path


def token_ids(text: bytes) -> Tensor:
    return torch.tensor([[byte + 3 for byte in text]])


@torch.no_grad()
def read(model: DRTForCausalLM, text: bytes, store: ChunkStore | None = None) -> DRTCache:
    """Read a text in one pass and close its last chunk."""
    ids = token_ids(text)
    ends = torch.zeros(ids.shape, dtype=torch.bool)
    ends[0, -1] = True
    cache = DRTCache(model.config, store)
    model(ids, past_key_values=cache, use_cache=True, chunk_ends=ends)
    return cache


@torch.no_grad()
def logits(model: DRTForCausalLM, cache: DRTCache, question: bytes = b"what is line 7? ") -> Tensor:
    return model(token_ids(question).expand(cache._batch_size(), -1), past_key_values=cache).logits


@pytest.mark.parametrize("length", [1, 7, 40, 61, 200, 700])
def test_an_archive_answers_as_reading_the_text_anew(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path, length: int
) -> None:
    """Shorter and longer than a pass, than a window, than what the upper decoder reaches back."""
    text = TEXT[:length]
    path = build(model, tokenizer, tmp_path / "a", write(tmp_path / "texts", a=text))
    assert verify_archive(path) == []
    expected = logits(model, read(model, text))
    torch.testing.assert_close(logits(model, DRTCache.open(path, model)), expected, rtol=1e-4, atol=1e-4)


def test_tiers_and_a_reopened_archive_give_the_same_logits(model: DRTForCausalLM, tmp_path: Path) -> None:
    """In float32 all are those of the device; rounded to bfloat16 they are one another's."""
    expected = logits(model, read(model, TEXT))
    for dtype in ("float32", "bfloat16"):
        found = []
        for store in (DeviceStore(dtype=dtype), HostStore(dtype)):
            found.append(logits(model, read(model, TEXT, store)))
        cache = read(model, TEXT, HostStore(dtype))
        description = describe_archive(model, ByT5Tokenizer(extra_ids=0), model_name="small", dtype=dtype)
        cache.save(tmp_path / dtype, description)
        assert verify_archive(tmp_path / dtype) == []
        found.append(logits(model, DRTCache.open(tmp_path / dtype, model)))
        for other in found:
            assert torch.equal(other, found[0])
        assert torch.equal(found[0], expected) == (dtype == "float32")


def test_generate_continues_an_archive(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    path = build(model, tokenizer, tmp_path / "a", write(tmp_path / "texts", a=TEXT))
    question = token_ids(b"line 20: ")
    options = {"max_new_tokens": 12, "do_sample": False}
    anew = read(model, TEXT)
    whole = torch.cat([token_ids(TEXT), question], 1)
    expected = model.generate(whole, past_key_values=anew, **options)[:, whole.shape[1] :]
    found = model.generate(question, past_key_values=DRTCache.open(path, model), **options)
    assert torch.equal(found[:, question.shape[1] :], expected)


def test_questions_in_a_batch_copy_nothing_and_leave_the_archive_alone(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    path = build(model, tokenizer, tmp_path / "a", write(tmp_path / "texts", a=TEXT))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    questions = [b"line 3: ", b"line 50: ", b"line 31: "]
    alone = [logits(model, DRTCache.open(path, model), question) for question in questions]
    cache = DRTCache.open(path, model)
    held = cache.store._pages[0].page
    cache.select_rows(torch.zeros(3, dtype=torch.long))
    ids = torch.cat([token_ids(question.ljust(9)) for question in questions])
    with torch.no_grad():
        together = model(ids, past_key_values=cache).logits
    for row, expected in enumerate(alone):
        torch.testing.assert_close(
            together[row : row + 1, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4
        )
    assert cache.store._pages[0].page is held
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("kind", ["device", "host", "archive"])
def test_copies_of_a_cache_go_their_own_ways(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path, kind: str
) -> None:
    """A text that is read once is copied for each way to go on, and the copies outlive it."""

    def begun() -> DRTCache:
        if kind == "archive":
            return DRTCache.open(tmp_path / "a", model)
        return read(model, TEXT, DeviceStore() if kind == "device" else HostStore("float32"))

    build(model, tokenizer, tmp_path / "a", write(tmp_path / "texts", a=TEXT))
    ways, question = (b"the first way to go on ", b"and another one "), b"what is line 7? "
    expected = []
    for way in ways:
        cache = begun()
        logits(model, cache, way)
        expected.append(logits(model, cache, question))
    copies = [copy.deepcopy(begun()) for _ in ways]
    gc.collect()
    others = [
        (tmp_path / "texts" / "a").open("rb") for _ in range(8)
    ]  # they take the numbers of closed files
    for one, way in zip(copies, ways, strict=True):
        logits(model, one, way)
    for one, wanted in zip(copies, expected, strict=True):
        assert torch.equal(logits(model, one, question), wanted)
    for other in others:
        other.close()


def test_documents_share_no_chunk_and_no_window(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    """The chunks of a document are those it has alone; the last one's end is where a question goes on."""
    texts = {"a": TEXT[:150], "b": TEXT[100:103], "c": TEXT[300:520]}
    files = write(tmp_path / "texts", **texts)
    path = build(model, tokenizer, tmp_path / "all", files)
    with Archive.open(path) as archive:
        assert [document.name for document in archive.documents] == [str(file) for file in files]
        for file, document in zip(files, archive.documents, strict=True):
            with Archive.open(build(model, tokenizer, tmp_path / f"only-{file.name}", [file])) as alone:
                chunks = torch.arange(document.num_chunks).view(1, 1, -1)
                assert document.num_chunks == alone.num_chunks
                both = zip(
                    alone.store().gather(chunks),
                    archive.store().gather(chunks + document.first_chunk),
                    strict=True,
                )
                assert all(torch.equal(one, other) for one, other in both)
            spans = [archive.source(document.first_chunk + n) for n in range(document.num_chunks)]
            assert b"".join(span.text for span in spans) == texts[file.name]
            assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
            assert all(len(span.text) == model.config.chunk_size for span in spans[:-1])


def tree(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 60, 101, 240, 400, 520])
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path, stop: int
) -> None:
    """Wherever it stops: before the first commit, inside a document, between two."""
    files = write(tmp_path / "texts", a=TEXT[:230], b=TEXT[50:90], c=TEXT[200:])
    whole = build(model, tokenizer, tmp_path / "whole", files)
    description = describe_archive(model, tokenizer, model_name="small", dtype="float32", segment_size=60)
    tokens = 0

    def count(read: int) -> None:
        nonlocal tokens
        tokens += read
        if tokens >= stop:
            raise Stop

    with ArchiveWriter.create(tmp_path / "cut", description) as writer, pytest.raises(Stop):
        read_documents(model, tokenizer, writer, files, count, commit_tokens=100)
    assert verify_archive(tmp_path / "cut"), "an unfinished archive is not whole"
    total: list[int] = []
    with ArchiveWriter.open(tmp_path / "cut") as writer:
        read_documents(model, tokenizer, writer, files, total.append, commit_tokens=100)
    assert tree(tmp_path / "cut") == tree(whole)
    assert sum(total) == sum(len(file.read_bytes()) for file in files)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, -2, -1, 0])
def test_ctrl_c_commits_what_was_read(
    model: DRTForCausalLM,
    tokenizer: ByT5Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    """In the midst of a pass, counted from the first or the last, which is brought to its end."""
    passes: list[int] = []
    stop_at = -1
    add_text = ArchiveWriter.add_text

    def interrupted(writer: ArchiveWriter, text: bytes, stops: NDArray[np.int64]) -> None:
        passes.append(len(text))
        if len(passes) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        add_text(writer, text, stops)

    monkeypatch.setattr(ArchiveWriter, "add_text", interrupted)
    files = write(tmp_path / "texts", a=TEXT[:230], b=TEXT[200:])
    whole = build(model, tokenizer, tmp_path / "whole", files)
    stop_at = stop if stop > 0 else len(passes) + stop
    passes.clear()
    description = describe_archive(model, tokenizer, model_name="small", dtype="float32", segment_size=60)
    with ArchiveWriter.create(tmp_path / "cut", description) as writer:
        with pytest.raises(KeyboardInterrupt):
            read_documents(model, tokenizer, writer, files)
        assert (len(passes), sum(passes)) == (stop_at, writer.num_tokens)
        assert writer.finished == (stop == 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if stop:
        assert verify_archive(tmp_path / "cut") != []
        with ArchiveWriter.open(tmp_path / "cut") as writer:
            read_documents(model, tokenizer, writer, files)
        for name in DATA_FILES:
            assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()
    assert verify_archive(tmp_path / "cut") == []


def test_a_second_ctrl_c_commits_no_half_of_a_pass(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "texts", a=TEXT)
    description = describe_archive(model, tokenizer, model_name="small", dtype="float32", segment_size=60)

    def interrupted(*arguments: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with ArchiveWriter.create(tmp_path / "cut", description) as writer:
        monkeypatch.setattr(ArchiveWriter, "add_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read_documents(model, tokenizer, writer, files)
        assert writer.num_segments == 0


def test_appending_goes_on_where_the_archive_ends(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    first, second = write(tmp_path / "texts", a=TEXT[:230], b=TEXT[200:])
    path = build(model, tokenizer, tmp_path / "a", [first])
    with Archive.open(path) as before, ArchiveWriter.open(path) as writer:
        read_documents(model, tokenizer, writer, [second])
        assert before.num_tokens == 230, "who has it open sees what was there"
        assert logits(model, DRTCache.open(before, model)).isfinite().all()
    both = build(model, tokenizer, tmp_path / "both", [first, second])
    found, expected = (logits(model, DRTCache.open(folder, model)) for folder in (path, both))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (path / "chunks.bin").read_bytes() == (both / "chunks.bin").read_bytes()


def test_files_of_another_build_are_refused(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    files = write(tmp_path / "texts", a=TEXT, b=TEXT[::-1])
    description = describe_archive(model, tokenizer, model_name="small", segment_size=60)

    def stop(read: int, tokens: list[int] = []) -> None:  # noqa: B006 (it counts)
        tokens.append(read)
        if sum(tokens) > 500:
            raise Stop

    with ArchiveWriter.create(tmp_path / "cut", description) as writer, pytest.raises(Stop):
        read_documents(model, tokenizer, writer, files, stop, commit_tokens=100)
    with ArchiveWriter.open(tmp_path / "cut") as writer:
        with pytest.raises(DRTError, match=r"unfinished build of .*a; expected files that begin with these"):
            read_documents(model, tokenizer, writer, files[1:])
        with pytest.raises(DRTError, match="is not finished: finish its build before asking"):
            DRTCache.open(writer, model)
        changed = bytearray(TEXT)
        changed[10] += 1
        files[0].write_bytes(changed)
        with pytest.raises(DRTError, match="has changed since"):
            read_documents(model, tokenizer, writer, files)
    with pytest.raises(DRTError, match="is not finished: its build stopped after"):
        DRTCache.open(tmp_path / "cut", model)


def test_another_model_or_tokenizer_is_refused(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    files = write(tmp_path / "texts", a=TEXT, empty=b"")
    path = build(model, tokenizer, tmp_path / "a", files[:1])
    DRTCache.open(path, model.to(torch.bfloat16))  # the same, in half precision
    model.float()
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    with pytest.raises(DRTError, match="was made by another model, small"):
        DRTCache.open(path, model)
    with ArchiveWriter.open(path) as writer, pytest.raises(DRTError, match="another model"):
        read_documents(model, tokenizer, writer, files)
    with Archive.open(path) as archive, pytest.raises(DRTError, match="another tokenizer"):
        archive.check(tokenizer_fingerprint="0" * 64)
    description = describe_archive(model, tokenizer, model_name="small")
    with (
        ArchiveWriter.create(tmp_path / "b", description) as writer,
        pytest.raises(DRTError, match="is empty"),
    ):
        read_documents(model, tokenizer, writer, files[1:])


@pytest.mark.parametrize("field", ["chunk_size", "num_heads", "head_dim", "landmark_size"])
def test_an_archive_of_other_sizes_is_refused(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path, field: str
) -> None:
    """Its fingerprint may be the model's: anybody can write that."""
    made = describe_archive(model, tokenizer, model_name="small")
    description = replace(made, **{field: getattr(made, field) + 1})
    with ArchiveWriter.create(tmp_path / "a", description) as writer:
        writer.commit({}, finished=True)
    with pytest.raises(DRTError, match=f"expected {field} {getattr(made, field)}, got"):
        DRTCache.open(tmp_path / "a", model)
    (file,) = write(tmp_path / "texts", a=TEXT)
    with ArchiveWriter.open(tmp_path / "a") as writer, pytest.raises(DRTError, match=f"expected {field}"):
        read_documents(model, tokenizer, writer, [file])


def test_a_decoding_state_that_does_not_fit_is_refused(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    path = build(model, tokenizer, tmp_path / "a", write(tmp_path / "texts", a=TEXT))
    with Archive.open(path) as archive:
        state, count = archive.state(), archive.num_chunks
    changes: list[tuple[str, Tensor | None]] = [(name, None) for name in state]
    for name, tensor in state.items():
        longer = tensor.repeat_interleave(100, min(1, tensor.dim() - 1))
        other = tensor.long() if tensor.is_floating_point() else tensor.float()
        changes += [(name, wrong) for wrong in (longer, tensor[None], tensor[:0], other)]
    changes += [
        ("open_lengths", torch.tensor([-1])),
        ("open_lengths", torch.tensor([2**40])),
        ("closed_counts", torch.tensor([count + 1])),
        ("closed_counts", torch.tensor([-(2**40)])),
        ("selection.0.chunk_indices", torch.full_like(state["selection.0.chunk_indices"], count)),
        ("selection.0.lengths", torch.full_like(state["selection.0.lengths"], 2**40)),
        ("layer.0.keys", state["layer.0.keys"][:, 1:]),
        ("layer.99.keys", state["layer.0.keys"]),
        ("anything", torch.zeros(1)),
    ]
    with Archive.open(path) as archive:
        for name, tensor in changes:
            archive._state = state | {name: tensor} if tensor is not None else state.copy()
            if tensor is None:
                del archive._state[name]
            with pytest.raises(DRTError, match=r"does not fit the model: in its decoding state, .*"):
                DRTCache.open(archive, model)
        archive._state = state
        assert logits(model, DRTCache.open(archive, model)).isfinite().all()


def test_a_conversation_is_appended_to_its_archive(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    path = build(model, tokenizer, tmp_path / "a", write(tmp_path / "texts", a=TEXT))
    expected = DRTCache.open(path, model)
    with ArchiveWriter.open(path) as writer:
        cache = DRTCache.open(writer, model)
        writer.begin_document("talk")
        for turn in (b"what was line 3? it was 9. ", b"and line 4?"):
            logits(model, cache, turn)
            logits(model, expected, turn)
            cache.save()
    assert verify_archive(path) == []
    with Archive.open(path) as archive:
        assert archive.documents[-1].name == "talk"
        assert archive.documents[-1].num_chunks == 38 // 7
        assert archive.source(archive.num_chunks - 1).text == b""
    assert torch.equal(logits(model, DRTCache.open(path, model)), logits(model, expected))


def test_a_save_that_failed_or_was_killed_can_be_repeated(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = read(model, TEXT), tmp_path / "some" / "a"
    description = describe_archive(model, tokenizer, model_name="small", dtype="float32")
    for function in ("pwrite", "fdatasync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(
                os, function, lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left"))
            )
            with pytest.raises(DRTError, match="No space left"):
                cache.save(path, description)
        assert list(tmp_path.iterdir()) == []
    for wrong in ({"chunk_size": 8}, {"landmark_size": 31}, {"num_heads": 1}):
        with pytest.raises(ValueError, match="as the archive's description says"):
            cache.save(path, dataclasses.replace(description, **wrong))
        assert list(tmp_path.iterdir()) == []
    writer = ArchiveWriter.create(path, dataclasses.replace(description, dtype="int8"))
    writer.begin_document("killed")
    writer.close()
    cache.save(path, description)
    assert verify_archive(path) == []
    assert torch.equal(logits(model, DRTCache.open(path, model)), logits(model, cache))


def test_what_cannot_be_saved(model: DRTForCausalLM, tmp_path: Path) -> None:
    cache = read(model, TEXT)
    with pytest.raises(ValueError, match="a path is required"):
        cache.save()
    with pytest.raises(ValueError, match="wants a description"):
        cache.save(tmp_path / "a")
    cache.select_rows(torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="holds one row, this cache 2"):
        cache.save(tmp_path / "a")


@pytest.mark.parametrize("passes", [[45] * 10, [7, 200, 300]])
def test_remembering_leaves_the_memory_of_reading(model: DRTForCausalLM, passes: list[int]) -> None:
    """The upper decoder adds nothing to the memory, and its state is made anew by the end of a text alone."""
    expected = read(model, TEXT)
    cache, start = DRTCache(model.config), 0
    for length in passes:
        model.model.remember(token_ids(TEXT[start : start + length]), cache)
        start += length
    assert len(TEXT) - start > upper_reach(model.config, 1)
    assert all(layer.keys is None for layer in cache.layers[1:])
    ends = torch.zeros(1, len(TEXT) - start, dtype=torch.bool)
    ends[0, -1] = True
    with torch.no_grad():
        model(token_ids(TEXT[start:]), past_key_values=cache, logits_to_keep=1, chunk_ends=ends)
    assert torch.equal(cache.store.counts, expected.store.counts)
    torch.testing.assert_close(logits(model, cache), logits(model, expected), rtol=1e-4, atol=1e-4)


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "été": 2, ":": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_places_of_words_in_a_file(tmp_path: Path) -> None:
    """Every byte belongs to one token, of long characters and blanks too; skipping tokens skips their bytes."""
    text = "the été: 😀 ok\n\n  the é\n".encode() * 3
    (file,) = write(tmp_path / "texts", a=text)
    stream = TokenStream(file, word_tokenizer())
    pieces = list(stream.pieces())
    assert b"".join(piece.text for piece in pieces) == text
    stops = [stop for piece in pieces for stop in piece.stops.tolist()]
    ids = [number for piece in pieces for number in piece.ids.tolist()]
    assert ids == [1, 2, 3, 0, 0, 1, 0] * 3
    words = [text[start:stop].strip() for start, stop in itertools.pairwise([0, *stops])]
    assert words == ["the", "été", ":", "😀", "ok", "the", "é"] * 3 or b" ".join(words).decode().split() == (
        ["the", "été", ":", "😀", "ok", "the", "é"] * 3
    )
    for skip in (1, 5, 20):
        (rest,) = stream.pieces(skip, stops[skip - 1])
        assert rest.text == text[stops[skip - 1] :]
        assert rest.ids.tolist() == ids[skip:]
        assert rest.stops.tolist() == stops[skip:]


def test_a_special_token_that_a_file_spells_is_text(tmp_path: Path) -> None:
    (file,) = write(tmp_path / "texts", a=b"the [UNK] the\n" * 2)
    (piece,) = TokenStream(file, word_tokenizer()).pieces()
    assert piece.ids.tolist() == [1, 0, 0, 0, 1] * 2  # a bracket, the name, a bracket


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_bfloat16_model_reads_chunks_of_any_precision(
    model: DRTForCausalLM, tmp_path: Path, dtype: str
) -> None:
    """Float32 holds bfloat16 exactly; the others are near it."""
    model = model.bfloat16()
    expected = logits(model, read(model, TEXT))
    cache = read(model, TEXT, DeviceStore(dtype=dtype))
    tokenizer = ByT5Tokenizer(extra_ids=0)
    cache.save(tmp_path / "a", describe_archive(model, tokenizer, model_name="small", dtype=dtype))
    host = read(model, TEXT, HostStore(dtype))
    for memory in (cache, host, DRTCache.open(tmp_path / "a", model)):
        found = logits(model, memory)
        assert found.dtype == torch.bfloat16
        if dtype == "float32":
            assert torch.equal(found, expected)
        assert (found - expected).float().norm() < 0.05 * expected.float().norm()


def test_settings_that_change_no_computation_change_no_fingerprint(make_model):
    model = make_model()
    made_by = model_fingerprint(model)
    model.config.close_prompt = False
    model.config.use_cache = False
    assert model_fingerprint(model) == made_by
    model.config.sink = not model.config.sink
    assert model_fingerprint(model) != made_by
