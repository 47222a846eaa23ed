"""The training configuration is read strictly, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from drt.data.needle_mix import NeedleMixConfig
from drt.errors import DRTError
from drt.train.config import TrainConfig, config_to_dict, load_config, mix_config
from drt.train.strict_yaml import read_mapping

MINIMAL = """
output_dir: out
model: {hidden_size: 32, chunk_size: 16}
data: {haystack: [a.txt], validation_haystack: [b.txt]}
curriculum:
  - {chunks: 4, threshold: 1}
  - chunks: 8
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_fill_what_is_left_out(path: Path) -> None:
    config = load_config(path)
    assert config.curriculum[0].threshold == 1.0
    assert isinstance(config.curriculum[0].threshold, float)
    assert config.optimizer.lr == 2e-3
    assert config.model == {"hidden_size": 32, "chunk_size": 16}


def test_resolved_configuration_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["curriculum.1.max_steps=7", "seed=3"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config_to_dict(config)))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optimizer.lr=1e-3", lambda config: config.optimizer.lr == 1e-3),
        ("optimizer.lr=3", lambda config: config.optimizer.lr == 3.0),
        ("curriculum.1.chunks=16", lambda config: config.curriculum[1].chunks == 16),
        ("curriculum=[{chunks: 5}]", lambda config: [stage.chunks for stage in config.curriculum] == [5]),
        ("validation.lengths=[100, 200]", lambda config: config.validation.lengths == [100, 200]),
        ("model.sink=false", lambda config: config.model.get("sink") is False),
        (
            "data.mix.question_rate=0.5",
            lambda config: mix_config(config, config.curriculum[1]).question_rate == 0.5,
        ),
        (
            "curriculum.1={chunks: 6, chain_share: 0.5, mix: {max_hops: 3}}",
            lambda config: (
                mix_config(config, config.curriculum[1])
                == NeedleMixConfig(rows=42, row_length=96, chunk_size=16, chain_share=0.5, max_hops=3)
            ),
        ),
        ("output_dir=a=b", lambda config: config.output_dir == "a=b"),
        ("curriculum.0.max_steps=null", lambda config: config.curriculum[0].max_steps is None),
    ],
)
def test_overrides(path: Path, override: str, read) -> None:
    assert not read(load_config(path, ["curriculum.0.max_steps=9"]))
    assert read(load_config(path, ["curriculum.0.max_steps=9", override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1e-3", r"unknown key optimizer\.lrr; expected one of lr, min_lr"),
        ("sead=1", r"unknown key sead"),
        ("optimizer.lr=fast", r"optimizer\.lr: expected a number, got 'fast' \(str\)"),
        ("max_steps=1.5", r"max_steps: expected a whole number, got 1\.5 \(float\)"),
        ("max_steps=true", r"max_steps: expected a whole number, got True \(bool\)"),
        ("curriculum.0.gumbel_noise=1", r"curriculum\.0\.gumbel_noise: expected true or false, got 1"),
        ("curriculum.0.chunks=a", r"curriculum\.0\.chunks: expected a whole number, got 'a'"),
        ("curriculum.2.chunks=4", r"expected an index 0\.\.1 of the list, got '2'"),
        ("curriculum=4", r"curriculum: expected a list, got 4"),
        ("curriculum=[]", r"curriculum: expected at least one stage"),
        ("data.haystack=a.txt", r"data\.haystack: expected a list, got 'a\.txt'"),
        ("data=null", r"data: expected a mapping of keys to values, got nothing"),
        ("model=1", r"model: expected a mapping"),
        ("seed.x=1", r"seed: expected a whole number|no keys below"),
        ("seed", r"expected key=value"),
        ("data.mix.question_rat=1", r"unknown key data\.mix\.question_rat;"),
        ("curriculum.1.mix.min_hops=a", r"curriculum\.1\.mix\.min_hops: expected a whole number, got 'a'"),
        ("curriculum.1.mix.decoy_rate=2", r"curriculum\.1\.mix\.decoy_rate: expected 0\.\.1, got 2"),
        (
            "tokens_per_step=100",
            r"tokens_per_step: expected at least 128, one row of curriculum\.1 \(8 chunks of 16 tokens\), got 100",
        ),
        (
            "data.mix.chain_share=0.5",
            r"data\.mix\.chain_share: not to be given here, it follows from the stage's",
        ),
        ("data.mix.chunk_size=16", r"data\.mix\.chunk_size: not to be given here"),
        ("data.mix.decoy_rate=2", r": data\.mix\.decoy_rate: expected 0\.\.1, got 2"),
        ("data.mix.min_hops=9", r": data\.mix\.min_hops, curriculum\.0\.mix\.max_hops: expected 1"),
        ("data.weights=[1, 2]", r": data\.weights: expected a number for each of the 1 entries"),
        ("data.weights=[-1]", r": data\.weights: "),
        ("data.weights=[0]", r": data\.weights: "),
        ("data.weights=[.inf]", r": data\.weights: "),
        ("data.weights=[.nan]", r": data\.weights: "),
        (
            "curriculum.1.retrieval_top_k=1000000",
            r": curriculum\.1\.retrieval_top_k: expected 1\.\.4096, got",
        ),
        ("curriculum.1.chunks=2", r": curriculum\.1\.chunks: expected a row of 64 tokens or more"),
        ("optimizer.lr=-1", r": optimizer\.min_lr: "),
        ("curriculum.1.mix.rows=2", r"curriculum\.1\.mix\.rows: not to be given here"),
        ("curriculum.0.mix.row_length=64", r"curriculum\.0\.mix\.row_length: not to be given here"),
        ("model.chunk_size=null", r"model\.chunk_size: expected a whole number >= 1, got None"),
        ("seed=[", r"not valid YAML"),
        ("optimizer.min_lr=1", r"optimizer\.min_lr: expected 0 <= min_lr <= lr"),
        ("max_steps=0", r"max_steps: expected at least 1, got 0"),
        ("device=tpu", r"device: expected auto, cpu or cuda, got 'tpu'"),
        ("dtype=float16", r"dtype: expected float32 or bfloat16, got 'float16'"),
        ("validation.tasks=[multi]", r"validation\.tasks: expected of .*got \['multi'\]"),
        ("optimizer.lr=.nan", r"optimizer\.(min_)?lr: expected"),
    ],
)
def test_mistakes_name_key_and_value(path: Path, override: str, message: str) -> None:
    load_config(path)  # fine without the mistake
    with pytest.raises(DRTError, match=message) as error:
        load_config(path, [override])
    assert "--set" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping of keys to values, got"),
        (MINIMAL.replace("output_dir: out", ""), "the key output_dir is missing"),
        (MINIMAL.replace("haystack: [a.txt],", ""), "the key data.haystack is missing"),
        (MINIMAL + "max_step: 3\n", "unknown key max_step"),
        (MINIMAL + "seed: 1\nseed: 2\n", r"the key seed stands twice, in line \d+ and line \d+"),
        (
            MINIMAL + "model: {hidden_size: 64, hidden_size: 128}\n",
            "the key (model|hidden_size) stands twice",
        ),
        ("[" * 5000, "not valid YAML"),
        (MINIMAL + "seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(DRTError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_merged_mapping_may_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("base: &base {lr: 1}\nnext: &next {<<: *base, lr: 2}\nlast: {<<: *next, lr: 3}\n")
    assert [values["lr"] for values in read_mapping(path).values()] == [1, 2, 3]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DRTError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")


def test_shipped_configurations_are_valid() -> None:
    folder = Path(__file__).parents[2] / "configs"
    names = [path.name for path in folder.glob("*.yaml") if isinstance(load_config(path), TrainConfig)]
    assert "needle-tiny.yaml" in names
