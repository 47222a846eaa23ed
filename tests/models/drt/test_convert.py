"""The authors' names and settings become ours; what does not fit is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ByT5Tokenizer

from drt.errors import DRTError
from drt.models.drt import DRTForCausalLM
from drt.models.drt.convert import config_from_authors, convert_authors_checkpoint, convert_state_dict
from drt.models.loading import load_model

DATA = Path(__file__).parents[2] / "data"


def settings(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


def authors(name: str) -> dict[str, Tensor]:
    """Parameters of a model of the authors' code."""
    recorded = load_file(DATA / f"{name}.safetensors").items()
    return {name.removeprefix("param."): x.float() for name, x in recorded if name.startswith("param.")}


SETTINGS = settings("drt_x1")


@pytest.fixture
def parameters() -> dict[str, Tensor]:
    return authors("drt_x1")


def convert(
    parameters: dict[str, Tensor], folder: Path, name: str = "drt_x1", **changes: Any
) -> DRTForCausalLM:
    """Through files, as a user does."""
    folder.mkdir(exist_ok=True)
    save_file(parameters, folder / "theirs.safetensors")
    (folder / "theirs.json").write_text(json.dumps(settings(name) | changes))
    return convert_authors_checkpoint(folder / "theirs.safetensors", folder / "theirs.json", folder / "ours")


@pytest.mark.parametrize(("name", "layers"), [("drt_x1", 2), ("drt_unequal", [1, 2])])
@torch.no_grad()
def test_converted_saved_and_loaded_it_gives_their_logits(tmp_path, name, layers):
    returned, recorded = convert(authors(name), tmp_path, name), load_file(DATA / f"{name}.safetensors")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "ours")
    model, _ = load_model(tmp_path / "ours")
    assert model.config.num_upper_layers == layers
    logits = model(recorded["input_ids"].long()).logits
    assert (logits - recorded["logits"]).abs().max() < 1e-4
    assert torch.equal(returned.eval()(recorded["input_ids"].long()).logits, logits)


def test_every_parameter_is_theirs(parameters):
    """Each of ours is one of theirs, unchanged; the landmark is a row of their embedding."""
    config = config_from_authors(SETTINGS)
    converted = convert_state_dict(parameters, config, SETTINGS["chunk_id"])
    assert converted.keys() == DRTForCausalLM(config).state_dict().keys()
    theirs = {tensor.data_ptr() for tensor in parameters.values()}
    landmark = converted.pop("model.landmark_embedding")
    assert torch.equal(landmark, parameters["model.embed_tokens.weight"][SETTINGS["chunk_id"]])
    assert {tensor.data_ptr() for tensor in converted.values()} == theirs


def test_settings(parameters):
    config = config_from_authors(SETTINGS)
    assert (config.sliding_window, config.chunk_size, config.retrieval_top_k) == (41, 63, 2)
    assert (config.num_lower_layers, config.num_upper_layers, config.num_groups) == (2, 2, 1)
    assert (config.sink, config.landmark_predicts, config.position_embedding) == (True, False, "alibi")
    assert config.close_prompt is False, "their training closes no chunk early"
    other = config_from_authors(SETTINGS | {"enable_alibi": False, "decoder_layers": [3, 2, 2]})
    assert (other.position_embedding, other.num_upper_layers, other.num_groups) == ("rope", 4, 2)


@pytest.mark.parametrize(("size", "sink"), [(63, True), (64, False), (127, True), (128, False)])
def test_chunks_that_fill_the_tiles_of_their_kernel_have_no_sink(size, sink):
    """Logits of their code at 64 agree within 1e-4 without it, and differ by 0.08 with it."""
    assert config_from_authors(SETTINGS | {"enc_chunk_size": size}).sink == sink


def test_layers_of_several_groups_are_counted_through(parameters):
    """Their upper layers are numbered (group, layer); ours go on from group to group."""
    config = config_from_authors(SETTINGS | {"decoder_layers": [2, 2, 2]})
    second = {name.replace("upper_layers.0.", "upper_layers.1."): x + 1 for name, x in parameters.items()}
    retriever = {"model.lmk_norms.1.weight": parameters["model.lmk_norms.0.weight"]}
    converted = convert_state_dict(second | retriever | parameters, config, SETTINGS["chunk_id"])
    assert converted.keys() == DRTForCausalLM(config).state_dict().keys()
    upper = [name for name in converted if re.search(r"upper_layers\.[01]\.", name)]
    assert len({name.split(".")[2] for name in upper}) == 2
    for name in upper:
        number = int(name.split(".")[2])
        later = name.replace(f"upper_layers.{number}", f"upper_layers.{number + 2}")
        assert torch.equal(converted[later], converted[name] + 1)


def test_a_checkpoint_as_their_trainer_writes_it(parameters, tmp_path):
    """Of a model that is trained in parallel, with the slopes of ALiBi in each layer."""
    plain = convert(parameters, tmp_path / "plain").state_dict()
    slopes = {f"model.{half}.self_attn.m": torch.ones(4) for half in ("lower_layers.0", "upper_layers.0.1")}
    theirs = {f"module.{name}": x for name, x in (parameters | slopes).items()}
    found = convert(theirs, tmp_path / "theirs").state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in found.items())


def test_a_layer_that_no_group_has_is_unknown(tmp_path):
    """Counted through, layer 1 of group 1 would take the place of layer 0 of group 2."""
    parameters, layers = authors("drt_unequal"), {"decoder_layers": [1, 2, 1]}
    with pytest.raises(DRTError, match=r"missing model\.upper_layers\.1\."):
        convert(parameters, tmp_path, "drt_unequal", **layers)
    config = config_from_authors(settings("drt_unequal") | layers)
    assert "model.upper_layers.1.1.mlp.up_proj.weight" in convert_state_dict(parameters, config, 15)


def test_names_that_do_not_fit(parameters, tmp_path):
    norm = parameters.pop("model.norm.weight")
    with pytest.raises(DRTError, match=r"does not fit .*theirs\.json: missing model\.norm\.weight$"):
        convert(parameters, tmp_path)
    with pytest.raises(DRTError, match=r"missing model\.norm\.weight; unknown model\.nrom\.weight$"):
        convert(parameters | {"model.nrom.weight": norm}, tmp_path)
    with pytest.raises(DRTError, match=r"theirs\.json: unknown model\.extra$"):
        convert(parameters | {"model.norm.weight": norm, "model.extra": torch.ones(2)}, tmp_path)
    with pytest.raises(DRTError, match=r"no model\.embed_tokens\.weight: is it one of the authors'\?"):
        convert({"weight": norm}, tmp_path)
    assert not (tmp_path / "ours").exists()


def test_shapes_that_do_not_fit(parameters, tmp_path):
    with pytest.raises(DRTError, match=r"theirs\.json: model\.norm\.weight is \(65,\), expected \(64,\)$"):
        convert(parameters | {"model.norm.weight": torch.ones(65)}, tmp_path)
    with pytest.raises(DRTError, match=r"gate_proj\.weight is \(96, 64\), expected \(128, 64\)"):
        convert(parameters, tmp_path, intermediate_size=128)
    with pytest.raises(DRTError, match=r"missing model\.lower_layers\.2"):
        convert(parameters, tmp_path, decoder_layers=[3, 2])
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("shape", [(), (5,), (50, 64), (101, 64, 1)], ids=str)
def test_an_embedding_of_another_shape(parameters, tmp_path, shape):
    """It is looked into before shapes are compared: that must not fail in another way."""
    with pytest.raises(DRTError, match=r"embed_tokens\.weight is \(.*\), expected \(101, 64\)"):
        convert(parameters | {"model.embed_tokens.weight": torch.ones(shape)}, tmp_path)
