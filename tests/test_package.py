"""The package as it is installed: version, metadata, files that ship, constraints that agree."""

from __future__ import annotations

import tarfile
from importlib.metadata import entry_points, metadata, requires
from importlib.resources import files
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from packaging.requirements import Requirement

import drt
from drt.models.loading import shipped_checkpoint

ROOT = Path(__file__).parents[1]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if not line.startswith("#"))


def test_version_is_that_of_the_distribution() -> None:
    assert metadata("drt-lm")["Version"] == drt.__version__


def test_the_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="drt")
    assert script.value == "drt.cli.app:main"


def test_types_ship() -> None:
    assert files("drt").joinpath("py.typed").is_file()


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in Path(drt.__file__).parent.rglob("*.py")}
    folders.remove(shipped_checkpoint())  # a saved folder: its module imports the package
    # The layer contract sees nothing else.
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def required() -> list[str]:
    """What an installation for the tests needs, by name."""
    own = [Requirement(line) for line in requires("drt-lm") or ()]
    return sorted(r.name.lower() for r in own if r.marker is None or r.marker.evaluate({"extra": "test"}))


@pytest.mark.parametrize("name", [name for name in required() if name != "drt-lm"])
def test_every_direct_dependency_has_an_exact_pin_in_its_range(name: str) -> None:
    found = [r for r in map(Requirement, requires("drt-lm") or ()) if r.name.lower() == name]
    assert found
    assert all(requirement.specifier.contains(constraints()[name]) for requirement in found)


def test_the_source_distribution_holds_what_its_tests_need(tmp_path: Path) -> None:
    builder = SdistBuilder(str(ROOT))
    with tarfile.open(next(builder.build(directory=str(tmp_path)))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("src", "tests", "configs", "benchmarks", "docs", "examples"):
        files_there = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        wanted = {str(path.relative_to(ROOT)) for path in files_there if path.suffix != ".pyc"}
        assert wanted
        assert not wanted - held
    assert {"constraints.txt", "Makefile", "README.md", "LICENSE", "pyproject.toml"} <= held
