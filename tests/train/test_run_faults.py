"""Runs and their folders when something goes wrong: kills in a save, damage, broken losses, two at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import BestAfter, Killed, MakeConfig, Run, kill

import drt.train.trainer
from drt.errors import DRTError
from drt.train.checkpoints import find_checkpoints
from drt.train.config import OptimizerConfig, ValidationConfig, config_to_dict, load_config
from drt.train.curriculum import RunningTotals
from drt.train.folder import claim
from drt.train.logs import read_metrics
from drt.train.trainer import NeedleTrainer


def test_a_kill_during_a_save_loses_one_interval(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    output_dir = Path(config.output_dir)
    mark_complete = drt.train.trainer.mark_complete

    def killed_at_six(folder: Path) -> None:
        if folder.name == "checkpoint-6":
            (folder / "optimizer.pt").unlink()
            raise Killed
        mark_complete(folder)

    with monkeypatch.context() as patch:
        patch.setattr(drt.train.trainer, "mark_complete", killed_at_six)
        with pytest.raises(Killed):
            run(config)
    assert [folder.name for folder in find_checkpoints(output_dir)[0]] == ["checkpoint-2", "checkpoint-4"]
    run.losses.clear()
    run(config)
    assert "checkpoint-6 is incomplete (a save was cut short): skipped" in run.output.getvalue()
    assert "going on from" in run.output.getvalue()
    assert min(run.losses) == 4


@pytest.mark.parametrize("damaged", ["newest", "both"])
def test_a_damaged_checkpoint_is_skipped(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    monkeypatch.setattr("drt.train.run.NeedleValidation", BestAfter(run, 8))
    run(make_config("whole"))
    expected = dict(run.losses)
    run.losses.clear()
    config = make_config("stopped")
    run.before_step[11] = kill
    with pytest.raises(Killed):
        run(config)
    run.before_step.clear()
    run.losses.clear()
    whole, _ = find_checkpoints(Path(config.output_dir))
    assert [folder.name for folder in whole] == ["checkpoint-8", "checkpoint-10"]
    hit = [(whole[1], "rng_state.pth"), (whole[0], "optimizer.pt")]
    for folder, name in hit[: 1 if damaged == "newest" else 2]:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    run(config)
    output = run.output.getvalue()
    assert "checkpoint-10 is damaged (rng_state.pth is not what was written): skipped" in output
    assert ("checkpoint-8 is damaged" in output) == (damaged == "both")
    first = 8 if damaged == "newest" else 0
    assert run.losses == {step: expected[step] for step in range(first, 12)}


def test_a_damaged_best_checkpoint_is_not_exported(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drt.train.run.NeedleValidation", BestAfter(run, 8))
    config = make_config("stopped")
    run.before_step[11] = kill
    with pytest.raises(Killed):
        run(config)
    run.before_step.clear()
    (Path(config.output_dir) / "checkpoint-8" / "model.safetensors").unlink()
    final = run(config)
    assert "checkpoint-8, the best so far by validation, is damaged" in run.output.getvalue()
    assert json.loads((final / "training.json").read_text())["exported_step"] == 12


def test_another_configurations_folder_is_refused(run: Run, make_config: MakeConfig) -> None:
    run(make_config(max_steps=1, eval_every=0))
    with pytest.raises(DRTError, match=r"another configuration \(seed: 0 there, 1 here\)"):
        run(make_config(max_steps=1, eval_every=0, seed=1))


@pytest.mark.parametrize("left", ["checkpoint-2", "final"])
def test_any_checkpoint_makes_a_folder_a_run(run: Run, make_config: MakeConfig, left: str) -> None:
    config = make_config()
    Path(config.output_dir).mkdir()
    claim(Path(config.output_dir), config)
    (Path(config.output_dir) / left).mkdir()
    with pytest.raises(DRTError, match="another configuration"):
        run(make_config(seed=1))


def test_a_start_that_failed_locks_no_folder(run: Run, make_config: MakeConfig) -> None:
    config = make_config(max_steps=1, eval_every=0)
    with pytest.raises(DRTError, match="hiden_size"):
        run(make_config(model={**config.model, "hiden_size": 3}))
    final = run(config)
    assert load_config(Path(config.output_dir) / "config.yaml") == config
    assert json.loads((final / "training.json").read_text())["config"] == config_to_dict(config)


def test_an_unwritable_output_folder_is_refused(run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DRTError, match="expected a folder that can be written"):
        run(make_config("file/run"))


def test_a_broken_loss_stops_the_run(run: Run, make_config: MakeConfig) -> None:
    config = make_config(optimizer=OptimizerConfig(lr=1e30, min_lr=0.0, warmup_steps=0, clip=1e30))
    with pytest.raises(DRTError, match=r"the (loss|largest weight) became (nan|inf) before step"):
        run(config)


def test_a_loss_that_breaks_between_two_logs_is_not_saved(run: Run, make_config: MakeConfig) -> None:
    config = make_config(save_every=2, log_every=100, eval_every=0)
    broken = NeedleTrainer.compute_loss

    def break_loss(self: NeedleTrainer, *args, **kwargs):
        loss = broken(self, *args, **kwargs)
        if self.state.global_step == 6:  # the loss itself is only seen in the sums
            self.find_callback(RunningTotals)._sums *= float("nan")
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NeedleTrainer, "compute_loss", break_loss)
        with pytest.raises(DRTError, match="the loss became nan before step 8"):
            run(config)
    assert [folder.name for folder in find_checkpoints(Path(config.output_dir))[0]] == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    run.losses.clear()
    run(config)
    assert sorted(run.losses) == list(range(6, 12))


def test_weights_that_break_are_not_saved(run: Run, make_config: MakeConfig) -> None:
    config = make_config(save_every=2, log_every=100, eval_every=0)
    step = NeedleTrainer.training_step

    def break_weight(self: NeedleTrainer, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 3:
            next(self.causal_lm.parameters()).grad.fill_(float("inf"))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NeedleTrainer, "training_step", break_weight)
        with pytest.raises(DRTError, match="the largest weight became nan before step 4"):
            run(config)
    assert [folder.name for folder in find_checkpoints(Path(config.output_dir))[0]] == ["checkpoint-2"]


def test_a_validation_that_is_not_finite_stops_the_run(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drt.train.run.NeedleValidation", lambda *_: lambda model: {"score": float("nan")})
    with pytest.raises(DRTError, match="the validation's score became nan before step 4"):
        run(make_config(save_every=100))


def test_another_configuration_is_told_by_its_keys(run: Run, make_config: MakeConfig) -> None:
    run(make_config(max_steps=1, eval_every=0))
    changed = make_config(max_steps=1, eval_every=0, optimizer=OptimizerConfig(warmup_steps=3))
    with pytest.raises(DRTError, match=r"\(optimizer\.warmup_steps: 2 there, 3 here\)"):
        run(changed)


def test_rows_and_questions_that_do_not_fit_are_told_by_their_keys(run: Run, make_config: MakeConfig) -> None:
    with pytest.raises(DRTError, match=r"^validation\.lengths, data\.validation_haystack: "):
        run(make_config(validation=ValidationConfig(lengths=[10**6])))
    config = make_config(eval_every=0)
    Path(config.data.haystack[0]).write_text("too short for a row of five chunks")
    with pytest.raises(
        DRTError, match=r"^curriculum\.0\.chunks: a text of the mix .*train.txt.* is too short"
    ):
        run(config)


def test_two_runs_in_one_folder(run: Run, make_config: MakeConfig) -> None:
    config = make_config(max_steps=2)

    def start_another() -> None:
        with pytest.raises(DRTError, match=f"{config.output_dir}: another process is training there"):
            run(config)

    run.before_step[1] = start_another
    final = run(config)
    assert [line["step"] for line in read_metrics(final / "metrics.jsonl") if "loss" in line] == [2]


@pytest.mark.parametrize("there", [None, "folder", "notes"])
def test_a_start_that_fails_leaves_the_disk_as_it_was(
    run: Run, make_config: MakeConfig, tmp_path: Path, there: str | None
) -> None:
    config = make_config("deep/below")
    if there is not None:
        Path(config.output_dir).mkdir(parents=True)
    if there == "notes":
        (Path(config.output_dir) / "notes.txt").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    run.before_step[0] = kill
    with pytest.raises(Killed):
        run(config)
    with pytest.raises(DRTError, match="hiden_size"):
        run(make_config("deep/below", model={**config.model, "hiden_size": 3}))
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_run_that_began_keeps_its_folder(run: Run, make_config: MakeConfig) -> None:
    config = make_config()
    run.before_step[1] = kill
    with pytest.raises(Killed):
        run(config)
    assert (Path(config.output_dir) / "config.yaml").is_file()


@pytest.mark.parametrize("content", [None, b"", b"{", b"- seed", b"\xff\xfe", b"seed: 1\n"])
def test_a_run_whose_configuration_is_gone_is_refused(
    run: Run, make_config: MakeConfig, content: bytes | None
) -> None:
    config = make_config(max_steps=1, eval_every=0)
    path = run(config).parent / "config.yaml"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DRTError, match=f"output_dir {path.parent} holds a run of another configuration"):
        run(config)


@pytest.mark.parametrize("name", ["checkpoint-2", "metrics.jsonl", "tensorboard"])
def test_no_link_is_followed_out_of_the_folder(
    run: Run, make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    config = make_config(max_steps=2, eval_every=0)
    output_dir, elsewhere = Path(config.output_dir), tmp_path / "elsewhere"
    output_dir.mkdir()
    claim(output_dir, config)
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (output_dir / name).symlink_to(elsewhere / "kept" if name == "metrics.jsonl" else elsewhere)
    with pytest.raises(DRTError, match=f"{name}.* a symbolic link"):
        run(config)
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]
    assert (elsewhere / "kept").read_text() == "kept"
