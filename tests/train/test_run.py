"""Whole runs: from start to export, stopped and resumed, interrupted, and refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from runs import BestAfter, Killed, MakeConfig, Run, comparable, kill, press
from transformers import AutoModelForCausalLM, AutoTokenizer

from drt.errors import DRTError, Interrupted
from drt.train.checkpoints import find_checkpoints
from drt.train.config import config_to_dict, load_config
from drt.train.logs import read_metrics
from drt.train.trainer import NeedleTrainer


def test_a_run_from_start_to_export(run: Run, make_config: MakeConfig) -> None:
    config = make_config()
    torch_threads = torch.get_num_threads()
    final = run(config)
    assert sorted(run.losses) == list(range(12))
    assert [run.stages[step] for step in range(12)] == [5] * 3 + [6] * 3 + [8] * 6
    assert torch.get_num_threads() == torch_threads

    metrics = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    trained = [line for line in metrics if "loss" in line]
    validated = [line for line in metrics if "eval_score" in line]
    assert [line["step"] for line in trained] == [3, 6, 9, 12]
    assert [line["step"] for line in validated] == [4, 8, 12]
    for index, line in enumerate(trained):
        expected = sum(run.losses[step] for step in range(3 * index, 3 * index + 3)) / 3
        assert line["loss"] == pytest.approx(expected)
        names = ["stage", "answer_loss", "answer_accuracy", "exact_match", "text_loss", "learning_rate"]
        assert {*names, "tokens_per_second", "grad_norm", "seconds"} <= set(line)
    assert "chain_exact_match" in trained[1]
    assert trained[-1]["learning_rate"] == pytest.approx(config.optimizer.min_lr, rel=1e-12)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.config.hidden_size == 32
    assert model.config.gumbel_noise is False
    assert tokenizer("ab").input_ids[:2] == [100, 101]
    assert read_metrics(final / "metrics.jsonl") == metrics
    record = json.loads((final / "training.json").read_text())
    assert record["command"] == "drt train run.yaml"
    assert record["steps"] == 12
    assert record["exported_step"] in (4, 8, 12)
    assert record["config"] == config_to_dict(config)
    assert {"drt-lm", "torch", "transformers", "python"} <= set(record["versions"])
    assert list((Path(config.output_dir) / "tensorboard").iterdir())

    run.losses.clear()
    assert run(config) == final  # a finished run is left as it is
    assert run.losses == {}


@pytest.mark.parametrize("killed_at", [1, 3, 5, 6, 7, 10])
def test_a_killed_run_resumes_bit_for_bit(run: Run, make_config: MakeConfig, killed_at: int) -> None:
    run(make_config("whole"))
    expected = dict(run.losses)
    run.losses.clear()
    run.before_step[killed_at] = kill
    with pytest.raises(Killed):
        run(make_config("killed"))
    run.before_step.clear()
    run.losses.clear()
    run(make_config("killed"))

    resumed_from = killed_at // 2 * 2  # save_every is 2
    assert sorted(run.losses) == list(range(resumed_from, 12))
    assert run.losses == {step: expected[step] for step in run.losses}
    folders = [Path(make_config(name).output_dir) for name in ("whole", "killed")]
    whole, killed = (
        [comparable(line) for line in read_metrics(folder / "metrics.jsonl")] for folder in folders
    )
    assert whole == killed


def test_another_seed_is_another_run(run: Run, make_config: MakeConfig) -> None:
    run(make_config("a", max_steps=2))
    first = dict(run.losses)
    run(make_config("b", max_steps=2, seed=1))
    assert all(run.losses[step] != first[step] for step in first)


def test_ctrl_c_saves_and_resumes(run: Run, make_config: MakeConfig) -> None:
    run(make_config("whole"))
    expected = dict(run.losses)
    run.losses.clear()
    run.before_step[6] = press
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped after step 7 .* run the same command again"):
        run(make_config("stopped"))
    assert signal.getsignal(signal.SIGINT) is previous
    assert max(run.losses) == 6  # the step at hand was finished, no other begun
    run.before_step.clear()
    run(make_config("stopped"))
    assert run.losses == expected


def test_ctrl_c_in_validation_saves(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = NeedleTrainer.evaluate

    def interrupted(self: NeedleTrainer, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, *args, **kwargs)

    config = make_config(save_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(NeedleTrainer, "evaluate", interrupted)
        with pytest.raises(Interrupted, match="stopped after step 4 "):
            run(config)
    assert [folder.name for folder in find_checkpoints(Path(config.output_dir))[0]] == ["checkpoint-4"]


def test_a_second_ctrl_c_saves_nothing(run: Run, make_config: MakeConfig) -> None:
    def press_twice() -> None:
        press()
        press()

    run.before_step[5] = press_twice
    config = make_config()
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(config)
    assert stopped.type is KeyboardInterrupt  # not Interrupted, which promises a checkpoint
    assert find_checkpoints(Path(config.output_dir))[0][-1].name == "checkpoint-4"


@pytest.mark.parametrize(
    ("where", "best"),
    [
        ("in the last step", 12),
        ("in the last validation", 12),
        ("in the last validation", 4),
        ("before the export", 12),
        ("in a step that is validated", 8),
        ("in a validation", 8),
    ],
)
def test_no_validation_and_no_step_is_lost_or_added(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, where: str, best: int
) -> None:
    validation = BestAfter(run, best)
    monkeypatch.setattr("drt.train.run.NeedleValidation", validation)
    whole = run(make_config("whole"))
    run.losses.clear()
    config = make_config("stopped")
    if where.endswith("validation"):
        validation.before = {12 if "last" in where else 8: press}
    elif "step" in where:
        run.before_step = {11 if "last" in where else 7: press}
    with monkeypatch.context() as patch:
        if where == "before the export":
            patch.setattr("drt.train.run.export", lambda *_: kill())
        with pytest.raises((Interrupted, Killed)):
            run(config)
    validation.before = run.before_step = {}
    trained = len(run.losses)
    stopped = run(config)

    assert sorted(run.losses) == list(range(12))
    assert trained == (8 if where in ("in a step that is validated", "in a validation") else 12)
    records = [json.loads((folder / "training.json").read_text()) for folder in (whole, stopped)]
    assert [(record["steps"], record["exported_step"]) for record in records] == [(12, best)] * 2
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    metrics = [
        [comparable(line) for line in read_metrics(each / "metrics.jsonl")] for each in (whole, stopped)
    ]
    assert metrics[0] == metrics[1]


def test_a_made_up_validation_can_be_interrupted(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = BestAfter(run, 12)
    monkeypatch.setattr("drt.train.run.NeedleValidation", validation)
    config = make_config()
    run.before_step[11] = press
    for _ in range(2):  # in the last step, then in its validation after going on
        with pytest.raises(Interrupted, match="stopped after step 12 "):
            run(config)
        validation.before[12] = press
    validation.before.clear()
    validated = [line["step"] for line in read_metrics(run(config) / "metrics.jsonl") if "eval_score" in line]
    assert validated == [4, 8, 12]


def test_a_made_up_validation_is_logged_once(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drt.train.run.NeedleValidation", BestAfter(run, 12))
    config = make_config()
    run.before_step = {
        7: press,
        8: kill,
    }  # killed after the validation of step 8, before the next checkpoint
    for error in (Interrupted, Killed):
        with pytest.raises(error):
            run(config)
    run.before_step = {}
    validated = [line["step"] for line in read_metrics(run(config) / "metrics.jsonl") if "eval_score" in line]
    assert validated == [4, 8, 12]


def test_only_the_best_and_the_last_checkpoint_stay(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.25, 0.25])
    monkeypatch.setattr("drt.train.run.NeedleValidation", lambda *_: lambda model: {"score": next(scores)})
    config = make_config()
    final = run(config)
    whole, _ = find_checkpoints(Path(config.output_dir))
    assert [folder.name for folder in whole] == ["checkpoint-4", "checkpoint-12"]
    assert json.loads((final / "training.json").read_text())["exported_step"] == 4
    exported = (final / "model.safetensors").read_bytes()
    assert exported == (whole[0] / "model.safetensors").read_bytes()
    assert exported != (whole[1] / "model.safetensors").read_bytes()


def test_without_validation_the_last_step_is_exported(run: Run, make_config: MakeConfig) -> None:
    final = run(make_config(eval_every=0, max_steps=3))
    assert json.loads((final / "training.json").read_text())["exported_step"] == 3


def test_bfloat16_trains_where_there_is_no_gpu(run: Run, make_config: MakeConfig) -> None:
    run(make_config("a", max_steps=2, device="auto", eval_every=0))
    exact = dict(run.losses)
    final = run(make_config("b", max_steps=2, device="auto", eval_every=0, dtype="bfloat16"))
    for step, loss in exact.items():
        assert run.losses[step] != loss
        assert run.losses[step] == pytest.approx(loss, rel=0.02)
    assert AutoModelForCausalLM.from_pretrained(final).dtype == torch.float32


def test_the_window_alone_can_be_trained(run: Run, make_config: MakeConfig) -> None:
    config = make_config(max_steps=2)
    run(make_config(max_steps=2, model={**config.model, "retrieval": False}))
    assert len(run.losses) == 2


def test_missing_haystack_is_named(run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    config.data.haystack[0] = str(tmp_path / "nothing.txt")
    with pytest.raises(DRTError, match=r"nothing\.txt.*drt data"):
        run(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hiden_size", 3, r"unknown key model\.hiden_size"),
        ("ranges", {}, r"unknown key model\.ranges"),
        ("retrieval_top_k", 0, r"^model\.retrieval_top_k must be at least 1, got 0"),
        ("retrieval_top_k", 10**6, r"^model\.retrieval_top_k must be at most 4,096, got 1,000,000"),
        (
            "hidden_size",
            10**9,
            r"^model\.hidden_size must be (at most|model\.num_attention_heads x model\.head_dim)",
        ),
    ],
)
def test_bad_model_fields_are_refused(
    run: Run, make_config: MakeConfig, field: str, value, message: str
) -> None:
    config = make_config()
    with pytest.raises(DRTError, match=message):
        run(make_config(model={**config.model, field: value}))


def test_config_file_of_a_run_trains_the_same(run: Run, make_config: MakeConfig) -> None:
    config = make_config(max_steps=1, eval_every=0)
    run(config)
    stored = Path(config.output_dir) / "config.yaml"
    assert load_config(stored) == config
    assert yaml.safe_load(stored.read_text())["model"] == config.model
