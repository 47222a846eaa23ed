"""YAML files read strictly into dataclasses.

An unknown key, a missing key or a value of the wrong type is a `DRTError` that names the file, the key's
dotted path, what was expected and what was given. `--set key=value` goes through the same checks.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from drt.errors import DRTError
from drt.files import read_bytes

T = TypeVar("T")


LARGEST_BYTES = 2**24  # of a file
LONGEST_SHOWN = 80  # characters of a value in a message


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader that reads `2e-3` as a number, as YAML 1.2 does (YAML 1.1 wants `2.0e-3`), and no key twice."""

    def compose_mapping_node(self, anchor: str | None) -> Any:
        """A mapping as it is written, before `<<` merges another into it, whose keys its own may repeat."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, (key.tag, str(key.value))
            if name in first:
                raise DRTError(
                    f"the key {key.value} stands twice, in line {first[name]} and line {line}; remove one of them"
                )
            first[name] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_mapping(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a file, changed by overrides.

    Args:
        path: YAML file.
        overrides: `key=value` strings; the key is a dotted path, the value is YAML.

    Raises:
        DRTError: the file cannot be read, is not YAML or holds no mapping; an override that does not fit.
    """
    try:
        text = read_bytes(path, LARGEST_BYTES, follow=True).decode()
    except UnicodeDecodeError as error:
        raise DRTError(f"{path}: cannot be read: {error}") from error
    values = _load_yaml(text, str(path))
    if not isinstance(values, dict):
        raise DRTError(f"{path}: expected a mapping of keys to values, got {describe(values)}")
    for override in overrides:
        _override(values, override)
    return values


def _load_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except DRTError as error:
        raise DRTError(f"{source}: {error}") from error
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise DRTError(f"{source}: not valid YAML: {error.problem or error.context}{place}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DRTError(f"{source}: not valid YAML: {error}") from error


def _override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise DRTError(f"--set {override}: expected key=value with a dotted key, as in optimizer.lr=1e-3")
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else _list_item(node, parent, override)
    value = _load_yaml(text, f"--set {override}")
    if isinstance(node, dict):
        node[last] = value
    else:
        _list_item(node, last, override)
        node[int(last)] = value


def _list_item(node: Any, index: str, override: str) -> Any:
    if not isinstance(node, list):
        raise DRTError(f"--set {override}: there are no keys below {describe(node)}")
    if not index.isdigit() or int(index) >= len(node):
        raise DRTError(f"--set {override}: expected an index 0..{len(node) - 1} of the list, got {index!r}")
    return node[int(index)]


def parse(cls: type[T], values: Any, path: str, source: str, elsewhere: Mapping[str, str] | None = None) -> T:
    """Build a dataclass from a mapping, checking every key and type.

    Args:
        cls: the dataclass; what its own checks refuse, they say as `name: reason` or `name, name: reason`.
        values: the mapping.
        path: dotted path of the mapping in the file, for messages.
        source: name of the file, for messages.
        elsewhere: dotted keys of the values that do not come from the mapping at `path`.

    Raises:
        DRTError: a key or a value that does not fit. The message has its full dotted key.
    """

    def dotted(name: str) -> str:
        return (elsewhere or {}).get(name) or (f"{path}.{name}" if path else name)

    if not isinstance(values, dict):
        where = path or "the top level"
        raise DRTError(f"{source}: {where}: expected a mapping of keys to values, got {describe(values)}")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise DRTError(f"{source}: unknown key {dotted(str(key))}; expected one of {', '.join(fields)}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise DRTError(f"{source}: the key {dotted(name)} is missing")
    hints = typing.get_type_hints(cls)
    parsed = {key: _convert(hints[key], value, dotted(key), source) for key, value in values.items()}
    try:
        return cls(**parsed)
    except ValueError as error:
        names, separator, reason = str(error).partition(": ")
        named = ", ".join(map(dotted, names.split(", ")))
        raise DRTError(f"{source}: {named}{separator}{reason}") from error


def _convert(hint: Any, value: Any, path: str, source: str) -> Any:
    """Check one value against its type hint; an int may stand where a float is required."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):  # only `X | None` occurs
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
        origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, path, source)
    if origin is list and isinstance(value, list):
        (item,) = typing.get_args(hint)
        return [_convert(item, entry, f"{path}.{index}", source) for index, entry in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise DRTError(f"{source}: {path}: expected {_NAMES.get(origin or hint, hint)}, got {describe(value)}")


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "a mapping of keys to values",
}


def describe(value: Any) -> str:
    """A value and its type, for messages."""
    shown = repr(value)
    if len(shown) > LONGEST_SHOWN:
        shown = f"{shown[:LONGEST_SHOWN]}..."
    return "nothing" if value is None else f"{shown} ({type(value).__name__})"
