"""How needles are written, which names a text takes, and names that are given once."""

from __future__ import annotations

import numpy as np
import pytest

from drt.data.formats import NAMES, Hidden, NamePool, chain, fact, name_uses, only_uses
from drt.errors import DRTError


def test_a_fact() -> None:
    assert fact("ab", 42) == Hidden(("|ab=00042|",), "|ab?", "00042")


def test_a_chain() -> None:
    assert chain(("ab", "cd", "ef")) == Hidden(("|ab>cd|", "|cd>ef|"), "|ab?>", "cd>ef")
    assert chain(("ab", "cd")) == Hidden(("|ab>cd|",), "|ab?>", "cd")


def test_names_count_where_a_needle_or_question_begins() -> None:
    text = b"|ab=12345|cd? |ab?12345| ab= |AB=1| |abc= |ef>gh| |gh|"
    assert name_uses(text) == {"ab": 2, "cd": 1, "ef": 1}


def test_only_uses() -> None:
    pieces = ["|ab=12345|", "|ab?"]
    assert only_uses(b"see |ab=12345| and |ab?", pieces)
    assert only_uses(b"see |ab=12345| and |cd=1| |ab?", pieces)  # another's name
    assert not only_uses(b"see |ab=12345|ab= and |ab?", pieces)  # one too many
    assert not only_uses(b"see |ab=12345| and", pieces)  # one too few


def test_a_pool_gives_every_name_once() -> None:
    pool = NamePool(np.random.default_rng(0), taken=["ab", "zz", "not a name"])
    assert len(pool) == 26 * 26 - 2
    drawn = [pool.draw() for _ in range(len(pool))]
    assert set(drawn) == set(NAMES) - {"ab", "zz"}
    assert drawn != sorted(drawn)
    assert len(pool) == 0
    with pytest.raises(DRTError, match="no name left"):
        pool.draw()
    with pytest.raises(DRTError, match="no name left"):
        pool.draw_like("ab")


def test_similar_names_differ_in_one_letter() -> None:
    pool = NamePool(np.random.default_rng(1), taken=["ab"])
    similar = [pool.draw_like("ab") for _ in range(30)]
    assert len(set(similar)) == 30
    assert all((name[0] == "a") != (name[1] == "b") for name in similar)
    assert {name[0] == "a" for name in similar} == {True, False}
    assert not set(similar) & {pool.draw() for _ in range(len(pool))}


def test_where_no_similar_name_is_left_any_name_is_given() -> None:
    only = "xy"
    pool = NamePool(np.random.default_rng(2), taken=[name for name in NAMES if name != only])
    assert pool.draw_like("ab") == only
