"""Reading documents into an archive: what `drt memory build` and `drt memory append` do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from drt.data.token_stream import TokenPiece, TokenStream
from drt.errors import DRTError
from drt.machine import hold_interrupt
from drt.memory import ArchiveDescription, ArchiveWriter, Document
from drt.models.common.devices import input_device
from drt.models.drt.archive_check import archive_sizes, check_archive
from drt.models.drt.archive_sources import check_not_own, check_unfinished, document_name
from drt.models.drt.cache_drt import DRTCache
from drt.models.drt.chunk_layout import upper_reach
from drt.models.drt.fingerprint import model_fingerprint, tokenizer_fingerprint
from drt.models.drt.modeling_drt import DRTForCausalLM

COMMIT_TOKENS = 2**18  # read between two commits: what a killed build has to read again


def describe_archive(
    model: DRTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_name: str,
    dtype: str = "bfloat16",
    segment_size: int = 4096,
) -> ArchiveDescription:
    """What an archive made by a model says of itself.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        model_name: for people.
        dtype: of keys and values: "bfloat16", "float32", "float16" or "int8".
        segment_size: tokens of a pass; whole chunks of it are read.

    Raises:
        DRTError: a model without a learned retriever.
        ValueError: another dtype, or a segment_size below 1.
    """
    config = model.config
    if not config.retrieval or config.retriever != "learned":
        raise DRTError(
            f"{model_name} has no chunk memory with learned landmarks: an archive needs a DRT model's"
        )
    return ArchiveDescription(
        model_name=model_name,
        model_fingerprint=model_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        segment_size=segment_size,
        dtype=dtype,
        **archive_sizes(config),
    )


@torch.no_grad()
def read_documents(
    model: DRTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    writer: ArchiveWriter,
    paths: Sequence[Path | str],
    on_progress: Callable[[int], None] | None = None,
    commit_tokens: int = COMMIT_TOKENS,
) -> None:
    """Read text files into an archive, one document each, and finish it.

    Each document begins with fresh attention windows and ends with a closed chunk; chunk numbers go on. Only the lower
    decoder and the chunk encoder run, but for the end of the last document, so the cost of a token does not grow with
    what the archive holds. An unfinished call resumes where it was last committed, with the same result as
    without the interruption, bit for bit on the same machine. Ctrl-C commits what was read; one pass is brought to its
    end first, a second Ctrl-C interrupts at once.

    Args:
        model: the archive's, in eval mode.
        tokenizer: its tokenizer.
        writer: open for writing.
        paths: texts, as `drt.data.text_files` reads them; of an unfinished call, the same ones. One of the name of a
            document that is held already is called by its full path.
        on_progress: called with numbers of tokens read, which add up to all of them.
        commit_tokens: tokens between two commits, at least.

    Raises:
        DRTError: another model or tokenizer, no file or an empty one, one of the archive's own, files that are not
            those of the unfinished call, a full disk.
        ValueError: a model in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before reading")
    check_archive(writer, model, tokenizer)
    files = [Path(path) for path in paths]
    if not files:
        raise DRTError(f"expected files for {writer.path} to read, got none")
    check_not_own(writer, files)
    check_unfinished(writer, files)
    reading = _Reading(model, writer, commit_tokens, on_progress or (lambda tokens: None))
    begun = writer.unfinished_documents
    try:
        for number, path in enumerate(files):
            stream, held = TokenStream(path, tokenizer), begun[number] if number < len(begun) else None
            if held is not None:
                reading.on_progress(held.num_tokens)
            if held is None or not held.complete:
                reading.read(stream, held, last=number == len(files) - 1)
        reading.finish()
    except KeyboardInterrupt:
        reading.keep()
        raise


class _Reading:
    """One call of `read_documents`."""

    def __init__(
        self,
        model: DRTForCausalLM,
        writer: ArchiveWriter,
        commit_tokens: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.model, self.writer, self.on_progress = model, writer, on_progress
        self.commit_tokens, self.uncommitted = commit_tokens, 0
        self.is_between_passes, self.is_at_end = True, False
        self.cache = DRTCache(model.config, writer.store())
        self.chunk_size = model.config.chunk_size
        # Whole chunks: none is open where a pass, and so a commit, ends.
        self.pass_tokens = max(1, writer.description.segment_size // self.chunk_size) * self.chunk_size
        self.reach = upper_reach(model.config, 1)

    def read(self, stream: TokenStream, held: Document | None, last: bool) -> None:
        """Read a document, or the rest of it."""
        if held is None:
            self.writer.begin_document(document_name(self.writer, stream.path))
            self.cache.begin_text()
        else:
            self.cache.load_state(self.writer.state(), input_device(self.model), self.model.dtype)
        self.cache.closed_counts = torch.tensor([int(self.cache.store.counts[0])], device="cpu")
        skip = (0, 0) if held is None else (held.num_tokens, held.num_bytes)
        empty = True
        for piece, is_end in _passes(stream.pieces(*skip), self.pass_tokens, self.reach):
            with self._uninterrupted():
                self._pass(piece, is_end, last)
            self.on_progress(len(piece.ids))
            empty = False
        if empty:
            raise DRTError(f"{stream.path} is empty; expected a text")

    def finish(self) -> None:
        """Commit for the last time."""
        with self._uninterrupted():
            self.writer.commit(self.cache.state(), finished=True)
            self.uncommitted = 0

    def keep(self) -> None:
        """Commit what was read until an interruption; but not the half of a pass or of a commit."""
        if self.is_between_passes and self.uncommitted:
            self.writer.commit(self.cache.state(), finished=self.is_at_end)

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        with hold_interrupt():
            self.is_between_passes = False
            yield
            self.is_between_passes = True

    def _pass(self, piece: TokenPiece, is_end: bool, last: bool) -> None:
        ids = torch.from_numpy(piece.ids).long().to(input_device(self.model))[None]
        ends = None
        if is_end:
            ends = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
            ends[0, -1] = True
        if is_end and last:
            self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, chunk_ends=ends)
        else:
            self.model.model.remember(ids, self.cache, ends)
        stops = piece.stops[self.chunk_size - 1 :: self.chunk_size]
        if len(piece.ids) % self.chunk_size:
            stops = np.append(stops, piece.stops[-1])
        self.writer.add_text(piece.text, stops)
        self.uncommitted += len(piece.ids)
        self.is_at_end = is_end and last
        if is_end:
            self.writer.end_document()
        if self.uncommitted >= self.commit_tokens and not self.is_at_end:
            self.writer.commit(self.cache.state(), finished=False)
            self.uncommitted = 0


def _passes(pieces: Iterator[TokenPiece], pass_tokens: int, reach: int) -> Iterator[tuple[TokenPiece, bool]]:
    """Pieces of just ``pass_tokens``, and a last one of at least ``reach`` where the text has so many; whether last."""
    held: TokenPiece | None = None
    for piece in pieces:
        held = (
            piece
            if held is None
            else TokenPiece(
                held.text + piece.text, np.append(held.ids, piece.ids), np.append(held.stops, piece.stops)
            )
        )
        first = 0
        begin = int(held.stops[0]) - _first_bytes(held)
        while len(held.ids) - first >= pass_tokens + reach:
            last = first + pass_tokens
            low = 0 if first == 0 else int(held.stops[first - 1]) - begin
            text = held.text[low : int(held.stops[last - 1]) - begin]
            yield TokenPiece(text, held.ids[first:last], held.stops[first:last]), False
            first = last
        if first:
            text = held.text[int(held.stops[first - 1]) - begin :]
            held = TokenPiece(text, held.ids[first:], held.stops[first:])
    if held is not None:
        yield held, True


def _first_bytes(piece: TokenPiece) -> int:
    """Bytes of a piece's first token."""
    return len(piece.text) - int(piece.stops[-1] - piece.stops[0])
