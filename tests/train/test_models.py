"""What a run starts with: fresh weights, or those of a checkpoint, which must be of the run's architecture."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from drt.data.tokenizer import fingerprint
from drt.errors import DRTError
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.train.config import CorpusConfig, LanguageModelConfig, StageConfig, TrainConfig
from drt.train.logs import read_metrics
from drt.train.models import build_model, make_tokenizer
from drt.train.run import run_training

MakeConfig = Callable[..., TrainConfig]


def run(config: Any) -> Path:
    return run_training(config, ["drt", "train", "run.yaml"], Console(file=io.StringIO()))


def losses(config: Any) -> list[float]:
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def start(tmp_path: Path, make_config: MakeConfig) -> Path:
    """A byte-level checkpoint of the architecture that `make_config` has, of other weights than its seed gives."""
    torch.manual_seed(5)
    folder = tmp_path / "start"
    DRTForCausalLM(DRTConfig(**make_config().model, gumbel_noise=True)).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def test_a_run_starts_from_a_checkpoint(start: Path, make_config: MakeConfig) -> None:
    held = AutoModelForCausalLM.from_pretrained(start).state_dict()
    fresh = make_config()
    for fields in ({}, fresh.model):
        model = build_model(make_config(init_from=str(start), model=fields, chunk_size=15))
        assert model.config.gumbel_noise is True
        assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    quiet = build_model(make_config(init_from=str(start), model={"gumbel_noise": False}, chunk_size=15))
    assert quiet.model.config.gumbel_noise is False
    assert not torch.equal(build_model(fresh).lm_head.weight, held["lm_head.weight"])


def test_the_task_says_whether_a_prompt_closes_its_chunk(
    start: Path, make_config: MakeConfig, corpus: Path
) -> None:
    data = CorpusConfig(corpus=str(corpus), sequence_length=64)
    fields = make_config().model

    def text(**settings: Any) -> Any:
        settings = {"model": fields, **settings}
        return build_model(
            LanguageModelConfig(task="language_model", output_dir="unused", data=data, **settings)
        )

    wanted = {
        False: [text(), text(init_from=str(start), model={})],
        True: [
            text(model={**fields, "close_prompt": True}),
            text(init_from=str(start), model={"close_prompt": True}),
            build_model(make_config()),
            build_model(make_config(init_from=str(start), model={}, chunk_size=15)),
        ],
    }
    for closes, models in wanted.items():
        for model in models:
            assert (model.config.close_prompt, model.generation_config.close_prompt) == (closes, closes)


def test_a_run_from_a_checkpoint_is_resumed_bit_for_bit(
    start: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"init_from": str(start), "max_steps": 4, "log_every": 1, "eval_every": 0}
    whole, killed = make_config("whole", **settings), make_config("killed", **settings)
    final = run(whole)
    assert json.loads((final / "config.json").read_text())["gumbel_noise"] is True, (
        "not that of the last stage"
    )
    with monkeypatch.context() as patch:
        patch.setattr("drt.train.run.MetricsFile.on_log", _kill_after_three)
        with pytest.raises(KeyboardInterrupt):
            run(killed)
    run(killed)
    assert losses(killed)[-2:] == losses(whole)[-2:]
    torch.testing.assert_close(_weights(killed), _weights(whole), rtol=0, atol=0)
    fresh = make_config("fresh", **settings | {"init_from": None})
    run(fresh)
    assert losses(fresh)[0] != losses(whole)[0]


def _kill_after_three(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
    if state.global_step == 3:
        raise KeyboardInterrupt


def _weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "final").state_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 64},
            r"start: a checkpoint of another architecture \(model.hidden_size: 32 there, 64 here",
        ),
        ({"model_type": "window"}, r"another architecture \(model.model_type: 'drt' there, 'window' here\)"),
        ({"position_embedding": "rope"}, "position_embedding: 'alibi' there, 'rope' here"),
        ({"hiden_size": 64}, r"unknown key model\.hiden_size"),
        ({"num_key_value_heads": None, "sink": 3}, "sink: True there, 3 here"),
        ({"gumbel_noise": "maybe"}, "Field 'model.gumbel_noise' expected bool, got str"),
        ({"num_upper_layers": [1, 2]}, r"num_upper_layers: 2 there, \[1, 2\] here"),
        ({"num_upper_layers": [1, 1, 1]}, r"num_upper_layers: 2 there, \[1, 1, 1\] here"),
    ],
)
def test_another_architecture_is_refused(
    start: Path, make_config: MakeConfig, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DRTError, match=message):
        run(make_config(init_from=str(start), model=fields, chunk_size=15))


def test_layers_listed_for_each_group_are_compared_by_what_they_say(
    start: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    def layers(folder: Path, fields: dict[str, Any]) -> list[int]:
        return build_model(
            make_config(init_from=str(folder), model=fields, chunk_size=15)
        ).config.layers_per_group

    assert layers(start, {"num_upper_layers": [1, 1]}) == [1, 1]
    unequal = make_config().model | {"num_upper_layers": [1, 2]}
    DRTForCausalLM(DRTConfig(**unequal)).save_pretrained(start)
    assert layers(start, unequal) == layers(start, {}) == [1, 2]
    with pytest.raises(DRTError, match=r"num_upper_layers: \[1, 2\] there, 3 here"):
        layers(start, {"num_upper_layers": 3})


def test_checkpoints_that_cannot_be_read_are_named(
    start: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(DRTError) as error:
            run(make_config(folder.name, init_from=str(folder), model={}, chunk_size=15))
        return str(error.value)

    assert "holds no tokenizer" in refused(tmp_path / "nothing")
    (start / "model.safetensors").rename(tmp_path / "weights")
    assert "the weights in" in refused(start)
    (start / "config.json").write_text("{}")
    assert "expected model_type" in refused(start)


def test_rows_are_counted_in_chunks_of_the_model(start: Path, make_config: MakeConfig) -> None:
    with pytest.raises(DRTError, match=r"chunk_size: expected the model's 15, got 16"):
        run(make_config(init_from=str(start), model={}, chunk_size=16))
    with pytest.raises(ValueError, match=r"chunk_size: expected model\.chunk_size = 15, got 16"):
        make_config(chunk_size=16)
    with pytest.raises(
        ValueError, match=r"chunk_size, model\.chunk_size: expected a whole number >= 1, got None"
    ):
        make_config(model={"model_type": "window"})


def test_a_language_model_learns_needles(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    pretraining = LanguageModelConfig(
        task="language_model",
        output_dir=str(tmp_path / "lm"),
        model=make_config().model,
        data=CorpusConfig(corpus=str(corpus), sequence_length=64),
        tokens_per_step=128,
        max_steps=1,
        eval_every=0,
        device="cpu",
    )
    pretrained = run(pretraining)
    needles = make_config(
        init_from=str(pretrained),
        model={},
        chunk_size=15,
        curriculum=[StageConfig(chunks=16)],
        max_steps=2,
        eval_every=2,
    )
    tokenizer = AutoTokenizer.from_pretrained(run(needles))
    assert fingerprint(tokenizer) == fingerprint(AutoTokenizer.from_pretrained(pretrained))
    again = dataclasses.replace(
        pretraining, output_dir=str(tmp_path / "again"), init_from=str(pretrained), model={}
    )
    assert build_model(again).config.vocab_size == 300
    assert fingerprint(make_tokenizer(again)) == fingerprint(tokenizer)


def test_a_corpus_of_another_tokenizer_is_refused(start: Path, corpus: Path) -> None:
    config = LanguageModelConfig(
        task="language_model",
        output_dir="unused",
        model={},
        init_from=str(start),
        data=CorpusConfig(corpus=str(corpus), sequence_length=64),
    )
    with pytest.raises(
        DRTError, match=r"its tokenizer is not that of the corpus .*drt data|prepare the corpus"
    ):
        make_tokenizer(config)


@pytest.mark.parametrize("model_type", ["window", "full_attention", "landmark", "block_recurrent"])
def test_baselines_learn_needles(make_config: MakeConfig, model_type: str) -> None:
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    if model_type == "landmark":
        fields["chunk_size"] = 15
    model = {"model_type": model_type, **fields}
    final = run(make_config(model=model, chunk_size=15, max_steps=4, eval_every=4))
    settings = json.loads((final / "config.json").read_text())
    assert settings["model_type"] == model_type
    assert "gumbel_noise" not in settings
