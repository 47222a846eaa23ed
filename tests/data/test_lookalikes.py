"""Pieces of text that look like needles: they are the text's, have signs in them, and resemble the name."""

from __future__ import annotations

import numpy as np
import pytest

from drt.data.lookalikes import SIZE, LookAlikes

PLAIN = "no sign here, only letters of a text. "
LIKE = "j1+i2=j12 i3=j4, "


def test_the_piece_most_like_the_name_is_drawn() -> None:
    text = (PLAIN * 50 + "x1 = y2 + z3, w4 = 15, v16 = 27. " * 50 + LIKE * 8 + PLAIN * 50).encode()
    found = {LookAlikes([text]).draw("ij", np.random.default_rng(seed)) for seed in range(5)}
    assert all(len(piece) == SIZE and piece in text.decode() and "j1+i2" in piece for piece in found)
    other = LookAlikes([text]).draw("xv", np.random.default_rng(0))
    assert "x1 = " in other


def test_a_text_without_signs_has_none() -> None:
    assert LookAlikes([PLAIN.encode() * 10, b""]).draw("ab", np.random.default_rng(0)) == ""


def test_a_character_that_a_piece_cuts_is_left_out() -> None:
    text = ("é" * 15 + "a123").encode() * 4  # 34 bytes: pieces of 32 begin within a character
    piece = LookAlikes([text[1:]]).draw("ab", np.random.default_rng(0))
    assert set(piece) <= set("éa123")
    assert "a" in piece


@pytest.mark.parametrize(
    "part",
    [
        "..|ij=12345|",
        "|ij? 1 2 3",
        "=1234, ",
        "j>12, 3",
        "ij=12, 3",
        "x = 12; j |".rjust(SIZE),
        "123 |ij".rjust(SIZE),
    ],
)
def test_a_part_of_a_needle_is_no_look_alike(part: str) -> None:
    piece = part.ljust(SIZE, ".")
    harmless = piece.replace("|", "/").replace("=", "0").replace(">", "0")
    assert LookAlikes([piece.encode()]).draw("ij", np.random.default_rng(0)) == ""
    assert LookAlikes([harmless.encode() * 2]).draw("ij", np.random.default_rng(0)) == harmless
