"""`drt convert`: checkpoints of the paper's authors, and files that are none."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drt.models.drt import DRTForCausalLM

Run = Callable[..., Any]
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    """What the authors' code holds and computes."""
    return load_file(DATA / "drt_x1.safetensors")


@pytest.fixture
def parameters(recorded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [name for name in recorded if name.startswith("param.")]
    return {name.removeprefix("param."): recorded[name] for name in names}


@pytest.fixture
def files(tmp_path: Path, parameters: dict[str, torch.Tensor]) -> Path:
    """A folder with the authors' model.safetensors and config.json."""
    folder = tmp_path / "authors"
    folder.mkdir()
    save_file(parameters, folder / "model.safetensors")
    (folder / "config.json").write_bytes((DATA / "drt_x1.json").read_bytes())
    return folder


@pytest.fixture
def refused(refuses: Run, files: Path, tmp_path: Path) -> Run:
    """The one line with which `drt convert CHECKPOINT` refuses; nothing is written."""

    def run(checkpoint: Path, config: Path | None = None) -> str:
        output = tmp_path / "converted"
        found = refuses("convert", checkpoint, "--config", config or files / "config.json", "-o", output)
        assert not output.exists()
        return found

    return run


def saved(form: str, folder: Path, parameters: dict[str, torch.Tensor]) -> Path:
    """The parameters in one of the forms that are read."""
    if form in (".pt", ".bin"):
        torch.save(parameters, folder / f"other{form}")
        return folder / f"other{form}"
    if form == "folder with .bin":
        (folder / "model.safetensors").unlink()
        torch.save(parameters, folder / "pytorch_model.bin")
    return folder if form.startswith("folder") else folder / "model.safetensors"


@pytest.mark.parametrize("form", [".safetensors", ".pt", ".bin", "folder", "folder with .bin"])
def test_every_form_gives_the_authors_model(
    drt: Run,
    files: Path,
    parameters: dict[str, torch.Tensor],
    recorded: dict[str, torch.Tensor],
    form: str,
) -> None:
    checkpoint = saved(form, files, parameters)
    result = drt("convert", checkpoint, "--config", files / "config.json", "--output", "converted")
    assert result.exit_code == 0, result.output
    model = DRTForCausalLM.from_pretrained("converted").eval()
    assert result.stderr == f"converted: {model.num_parameters():,} parameters\n"
    assert result.stdout == ""
    ids = recorded["input_ids"][:1, :130]
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, recorded["logits"][:1, :130], rtol=1e-4, atol=1e-4)


def test_missing_files_are_named(refused: Run, files: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing.pt") == f"no checkpoint at {tmp_path / 'nothing.pt'}"
    assert "nothing.json: cannot be read" in refused(files, tmp_path / "nothing.json")
    (tmp_path / "empty").mkdir()
    assert "holds neither model.safetensors nor pytorch_model.bin" in refused(tmp_path / "empty")


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt", "text.safetensors", "text.pt", "empty.pt"])
def test_files_that_cannot_be_read_are_named(
    refused: Run, tmp_path: Path, parameters: dict[str, torch.Tensor], name: str
) -> None:
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(parameters, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"just text", "empty": b""}[path.stem])
    assert refused(path).startswith(f"{path} ")


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_code_never_runs(refused: Run, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"model.embed_tokens.weight": Harmful(mark)}, tmp_path / "harmful.pt")
    (tmp_path / "harmful.bin").write_bytes(pickle.dumps(Harmful(mark), protocol=2))
    for name in ("harmful.pt", "harmful.bin"):
        assert f"{name} holds something other than tensors" in refused(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), {"step": 3}, {"model": {"weight": torch.ones(1)}}, {3: torch.ones(1)}],
)
def test_a_file_of_something_else_is_named(refused: Run, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert "other.pt: expected a dictionary of names and tensors" in refused(tmp_path / "other.pt")


def test_parameters_that_do_not_fit_are_named(
    refused: Run, tmp_path: Path, parameters: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.pt"
    torch.save({name: tensor for name, tensor in parameters.items() if "upper" not in name}, path)
    assert "does not fit" in (found := refused(path))
    assert "missing model.upper_layers" in found
    torch.save(parameters | {"extra.weight": torch.ones(1)}, path)
    assert "unknown extra.weight" in refused(path)
    torch.save(parameters | {"model.norm.weight": torch.ones(7)}, path)
    assert "model.norm.weight is (7,), expected (64,)" in refused(path)
    torch.save({"weight": torch.ones(1)}, path)
    assert "holds no model.embed_tokens.weight" in refused(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_topk": None}, "lacks chunk_topk"),
        (
            {"decoder_layers": [2, 2, 0]},
            "decoder_layers must be [lower, group, ...], whole numbers of at least 1, got [2, 2, 0]",
        ),
        ({"decoder_layers": 4}, "decoder_layers must be [lower, group, ...]"),
        ({"decoder_layers": [2]}, "decoder_layers must be [lower, group, ...]"),
        ({"decoder_layers": [2, "2"]}, "decoder_layers must be [lower, group, ...]"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ({"hidden_size": "64"}, "the authors' configuration: Field 'hidden_size' expected int, got str"),
        (
            {"hidden_size": 63},
            "the authors' configuration: hidden_size must be num_attention_heads x head_dim",
        ),
        ({"slide_window": "512"}, "slide_window must be a whole number, got '512'"),
        ({"chunk_id": 101}, "chunk_id must be below vocab_size, got 101, 101"),
        ({"chunk_id": "100"}, "chunk_id must be a whole number"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(
    refused: Run, files: Path, changes: dict[str, Any], message: str
) -> None:
    path = files / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    assert message in refused(files)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"3"])
def test_a_configuration_that_is_none_is_named(refused: Run, files: Path, content: bytes) -> None:
    (files / "config.json").write_bytes(content)
    assert str(files / "config.json") in refused(files)


def test_an_output_that_cannot_be_written_is_named(refuses: Run, files: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    for output in (blocked, blocked / "below"):
        assert str(blocked) in refuses("convert", files, "--config", files / "config.json", "-o", output)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_the_converted_model_follows_no_link(refuses: Run, files: Path, tmp_path: Path, name: str) -> None:
    output, target = tmp_path / "converted", tmp_path / "target"
    output.mkdir()
    target.write_text("kept")
    (output / name).symlink_to(target)
    assert name in refuses("convert", files, "--config", files / "config.json", "-o", output)
    assert target.read_text() == "kept"
    assert [path.name for path in output.iterdir()] == [name]
