"""`load_model`: a good folder loads; of a bad one the error says what is wrong and where."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from drt.data.tokenizer import load_tokenizer as load_named_tokenizer
from drt.errors import DRTError
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.drt.embedder import TextEmbedder
from drt.models.loading import load_model, load_tokenizer, shipped_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = DRTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_lower_layers=1,
        num_upper_layers=1,
        num_encoder_layers=1,
        num_attention_heads=2,
        chunk_size=7,
        retrieval_top_k=2,
        sliding_window=10,
    )
    DRTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def refused(folder: Path) -> Callable[..., str]:
    """The message with which the folder is refused; always a DRTError."""

    def load(path: Path = folder) -> str:
        with pytest.raises(DRTError) as refusal:
            load_model(path)
        assert str(path) in str(refusal.value), "the message names the folder"
        return str(refusal.value)

    return load


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_good_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(folder)
    assert isinstance(model, DRTForCausalLM)
    assert not model.training
    assert model.dtype == torch.float32
    stored = load_file(folder / WEIGHTS)
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())
    assert tokenizer.decode(tokenizer.encode("Näh.", add_special_tokens=False)) == "Näh."
    assert capsys.readouterr() == ("", "")
    assert load_model(str(folder), torch.bfloat16)[0].dtype == torch.bfloat16


def test_stored_dtype_is_kept(folder: Path) -> None:
    DRTForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert load_model(folder)[0].dtype == torch.bfloat16


def test_no_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(tmp_path / "none").startswith("no checkpoint folder at ")
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file").startswith("no checkpoint folder at ")
    (tmp_path / "empty").mkdir()
    assert "is not a checkpoint folder: it holds no config.json" in refused(tmp_path / "empty")


def test_another_architecture(refused: Callable[..., str], folder: Path) -> None:
    change_config(folder, model_type="llama")
    assert re.search(r"config\.json: expected model_type drt, .*window.*, got 'llama'$", refused())
    change_config(folder, model_type=["drt"])
    assert refused().endswith(", got ['drt']")
    for content in ("{}", "[]", "7"):
        (folder / "config.json").write_text(content)
        assert refused().endswith(", got None")


@pytest.mark.parametrize("content", [b"", b"{", b'{"model_type": "drt"', b"\xff\xfe\x00"])
def test_a_damaged_configuration(refused: Callable[..., str], folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json: expected a JSON file" in refused()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"num_attention_heads": 3}, "num_key_value_heads must divide num_attention_heads, got 2 and 3"),
        ({"hidden_size": "16"}, "'hidden_size' expected int, got str"),
        ({"position_embedding": "sinus"}, "got 'sinus'"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(
    refused: Callable[..., str], folder: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, **changes)
    found = refused()
    assert found.startswith(f"{folder / 'config.json'}: ")
    assert message in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10**9}, "vocab_size must be at most "),
        ({"num_lower_layers": 10**6}, "num_lower_layers must be at most "),
        ({"num_upper_layers": 10**9}, "num_upper_layers must be at most "),
        ({"num_upper_layers": [1] * 10**5, "num_groups": None}, "num_upper_layers must be at most "),
        ({"num_lower_layers": 1024}, "weights, expected 1026 layers"),
        ({"sliding_window": 10**12}, "sliding_window must be at most "),
        ({"retrieval_top_k": 10**9}, "retrieval_top_k must be at most "),
        ({"chunk_size": 10**9}, "chunk_size must be at most "),
        ({"num_labels": 10**10}, "num_labels must be at most "),
        ({"vocab_size": 2**24}, f"model.embed_tokens.weight is (259, 16), expected ({2**24}, 16)"),
        ({"rope_theta": float("nan")}, "rope_theta must be at least "),
        ({"initializer_range": 1e300}, "initializer_range must be at most "),
        ({"pad_token_id": 10**12}, "pad_token_id must lie in "),
        ({"eos_token_id": [1, -5]}, "eos_token_id must lie in "),
        ({"dtype": "nonsense"}, "dtype must be one of float32, "),
        ({"dtype": "int8"}, "dtype must be one of float32, "),
        ({"dtype": "nn"}, "dtype must be one of float32, "),
        ({"quantization_config": {"quant_method": "unknown"}}, "quantization_config is not supported"),
        ({"quantization_config": "unknown"}, "quantization_config is not supported"),
        ({"attn_implementation": "kernels-community/any"}, 'attn_implementation must be "eager"'),
        ({"_attn_implementation": {"": "somebody/kernel"}}, 'attn_implementation must be "eager"'),
        ({"experts_implementation": "somebody/kernel"}, 'experts_implementation must be "eager"'),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder must be False"),
        ({"to_dict": 1}, "to_dict is not a field"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is not a field"),
        ({"id2label": 3}, "config.json: "),
    ],
)
def test_absurd_or_hostile_settings_are_refused_at_once(
    refused: Callable[..., str], folder: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, **changes)
    with count_allocated() as allocated:
        assert message in refused()
    assert allocated() < 2**26


@contextmanager
def count_allocated() -> Iterator[Callable[[], int]]:
    """How far the process' peak memory rises in the block, in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield lambda: 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_tokenizer_of_more_tokens_than_memory(refused: Callable[..., str], folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_ids": 10**12}))
    assert "tokenizer_config.json: extra_ids must be at most " in refused()


@pytest.mark.parametrize("content", ["[" * 100_000, '{"model_type": ' * 100_000])
def test_deep_nesting(refused: Callable[..., str], folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert refused().endswith("config.json: expected a JSON file: nested too deeply")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer_config.json", "generation_config.json"])
def test_only_regular_files_are_opened(refused: Callable[..., str], folder: Path, name: str) -> None:
    kept = (folder / name).rename(folder.parent / name)
    os.mkfifo(folder / name)
    assert f"{name}: expected a regular file, got a pipe" in refused()
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{name}: expected a regular file, got a link to a device" in refused()
    (folder / name).unlink()
    (folder / name).symlink_to(kept)  # as in the cache of the Hugging Face hub
    load_model(folder)


def test_code_in_a_checkpoint_does_not_run(
    refused: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask
    (folder / "theirs.py").write_text("raise SystemExit('the code ran')")
    change_config(folder, auto_map={"AutoConfig": "theirs.A", "AutoModelForCausalLM": "theirs.B"})
    load_model(folder)  # the installed classes are meant
    path = folder / "tokenizer_config.json"
    settings = {"auto_map": {"AutoTokenizer": ["theirs.C", None]}, "tokenizer_class": "C"}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert "custom code" in refused()
    with pytest.raises(DRTError, match="custom code"):
        load_named_tokenizer(str(folder))
    with pytest.raises(DRTError, match="custom code"):
        TextEmbedder(ByT5Tokenizer(extra_ids=0), folder, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefill_chunk_size", 0),
        ("prefill_chunk_size", "many"),
        ("prefill_chunk_size", True),
        ("close_prompt", "no"),
    ],
)
def test_a_generation_configuration_that_makes_no_sense(
    refused: Callable[..., str], folder: Path, name: str, value: Any
) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    message = refused()
    assert f"generation_config.json: {name} must be" in message
    assert message.endswith(f"got {value!r}")


def test_weights_in_several_files(refused: Callable[..., str], folder: Path) -> None:
    model, _ = load_model(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    found, _ = load_model(folder)
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in model.state_dict().items())
    for names in ("../other.safetensors", 5):
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"weight": names}}))
        assert "expected a weight_map" in refused()


@pytest.mark.parametrize("kept", [0, 4, 8, 200, -1000, -1])
def test_truncated_weights(refused: Callable[..., str], folder: Path, kept: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    assert "are truncated or damaged" in refused()


@pytest.mark.parametrize("place", [0, 7, 8, 20, 100])
def test_a_damaged_header(refused: Callable[..., str], folder: Path, place: int) -> None:
    damaged = bytearray((folder / WEIGHTS).read_bytes())
    damaged[place : place + 4] = b"\xff\xfe\xff\xfe"
    (folder / WEIGHTS).write_bytes(bytes(damaged))
    assert "are truncated or damaged" in refused()


def test_no_weights(refused: Callable[..., str], folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    found = refused()
    assert f"the weights in {folder} cannot be read" in found
    assert WEIGHTS in found


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_weights_only(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(mark)))
    assert "cannot be read" in refused()
    assert not mark.exists(), "pickled code must not run"


def test_weights_that_do_not_fit(refused: Callable[..., str], folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    assert f"the weights in {folder} do not fit its config.json: missing model.norm.weight" in refused()
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(17)}))
    assert "model.norm.weight is (17,), expected (16,)" in refused()
    change_weights(
        folder, lambda weights: weights.update({"model.norm.weight": torch.ones(16), "more": torch.ones(1)})
    )
    assert refused().endswith("do not fit its config.json: unknown more")


def test_a_configuration_of_other_sizes(refused: Callable[..., str], folder: Path) -> None:
    change_config(folder, num_lower_layers=2)
    assert re.search(r"missing model\.lower_layers\.1\..*; \.\.\.$", refused()), "five are named, then dots"
    change_config(folder, num_lower_layers=1, intermediate_size=24)
    assert "is (16, 16), expected (24, 16)" in refused()
    change_config(folder, intermediate_size=16, retrieval=False)
    assert "unknown model.chunk_" in refused()


def test_no_tokenizer(refused: Callable[..., str], folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", WEIGHTS, "generation_config.json"):
            path.unlink()
    assert "holds no tokenizer; save the one that the model was trained with into it" in refused()


@pytest.mark.parametrize("content", ["{", "[]", '{"tokenizer_class": "Nothing"}'])
def test_a_damaged_tokenizer(refused: Callable[..., str], folder: Path, content: str) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "tokenizer_config.json").write_text(content)
    assert f"the tokenizer in {folder} cannot be read" in refused()


def test_the_checkpoints_that_ship() -> None:
    with pytest.raises(DRTError, match="ships no checkpoint nonsense; name a folder with --checkpoint"):
        shipped_checkpoint("nonsense")


def test_a_missing_folder_is_not_called_one_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DRTError, match="no checkpoint folder at"):
        load_tokenizer(tmp_path / "nowhere")
