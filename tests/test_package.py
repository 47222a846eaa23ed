"""The package as it is installed: version, metadata, files that ship, constraints that agree."""

from __future__ import annotations

import tomllib
from importlib.metadata import entry_points, metadata, requires
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import drt

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


def required() -> list[str]:
    """What an installation for the tests needs, by name."""
    own = [Requirement(line) for line in requires("drt-lm") or ()]
    return sorted(r.name.lower() for r in own if r.marker is None or r.marker.evaluate({"extra": "test"}))


@pytest.mark.parametrize("name", [name for name in required() if name != "drt-lm"])
def test_every_direct_dependency_has_an_exact_pin_in_its_range(name: str) -> None:
    found = [r for r in map(Requirement, requires("drt-lm") or ()) if r.name.lower() == name]
    assert found
    assert all(requirement.specifier.contains(constraints()[name]) for requirement in found)


def test_source_distribution_names_what_exists() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for path in settings["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]:
        assert (ROOT / path).exists(), path
