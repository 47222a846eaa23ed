"""JSON lines: one object a line, with texts in its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drt.data.text_files import text_lines
from drt.errors import DRTError


def json_rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, plain or compressed, each with its place, `FILE:LINE`; blank lines are none.

    Raises:
        DRTError: the file cannot be read, or a line is no JSON object; the message names it.
    """
    number = 0
    for line in text_lines(path):
        number += 1
        if not line or line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            del line  # it may be a whole book, which is in the row now
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise DRTError(
                f"{where}: expected JSON lines, one whole object a line: {reason}; "
                "jq -c '.[]' makes lines of a JSON list"
            ) from error
        if not isinstance(row, dict):
            raise DRTError(f"{where}: expected a JSON object, got {_describe(row)}")
        yield where, row


def text_field_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text in a field of a row.

    Args:
        row: of JSON lines or a table.
        field: its name.
        where: the row's place, for the message.

    Raises:
        DRTError: there is no such field, or no text in it.
    """
    if field not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise DRTError(f"{where}: expected a text in the field {field!r}, got other fields: {fields}")
    if not isinstance(row[field], str):
        raise DRTError(f"{where}: expected a text in the field {field!r}, got {_describe(row[field])}")
    return str(row[field])


def _describe(value: Any) -> str:
    """The kind of a value in JSON's words."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a text",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
