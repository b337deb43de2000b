"""Typed trees of settings: dataclasses whose fields are knobs, made from plain values with every mistake named.

A knob knows its default, what it is for, and its range; the rest follows from its type.
"""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field
from typing import Any, Literal, TypeVar

from dstrain.errors import ConfigError, did_you_mean

T = TypeVar("T")


def knob(default: Any, about: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field with its default (`...` = must be given), one line for `--help`, and its range."""
    metadata = {"about": about, "low": low, "high": high, "may_be_empty": default == []}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def build(cls: type[T], values: Any, where: str, prefix: str = "", root: type | None = None) -> T:
    """Make dataclass `cls` from a mapping, refusing unknown keys, missing keys, wrong types and values out of range.

    `root` is the dataclass of the whole tree, in which an unknown key is looked for if the section has none like it.
    """
    root = root or cls
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'recipe'} must be a mapping, not {values!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {prefix + str(key)!r}{_hint(str(key), known, root)}"
                f" (known here: {', '.join(known)})"
            )
    given: dict[str, Any] = {}
    for name, f in known.items():
        key, kind = prefix + name, hints[name]
        if name in values:
            value = values[name]
            if dataclasses.is_dataclass(kind):
                given[name] = build(typing.cast(type, kind), {} if value is None else value, where, key + ".", root)
            else:
                given[name] = _coerce(value, kind, f.metadata, f"{where}: {key}")
        elif f.default is MISSING and f.default_factory is MISSING:
            about = f.metadata.get("about", "see launch/recipes/ for examples")
            raise ConfigError(f"{where}: {key} must be given: {about}")
    try:
        return cls(**given)
    except ConfigError as e:  # of values that do not go together
        raise ConfigError(f"{where}: {e}") from None


def _hint(key: str, known: Iterable[str], root: type) -> str:
    """What may have been meant: the nearest name of the section or, with its whole key, of the tree."""
    names = _everywhere(root) | {name: name for name in known}
    near = difflib.get_close_matches(key, names, n=1)
    return f", did you mean {names[near[0]]!r}?" if near else ""


def _everywhere(cls: type, prefix: str = "") -> dict[str, str]:
    """Names of all knobs of a tree, with their whole keys; of two with one name the first."""
    found: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key, kind = prefix + f.name, hints[f.name]
        below = _everywhere(typing.cast(type, kind), key + ".") if dataclasses.is_dataclass(kind) else {f.name: key}
        found = below | found
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree of sections by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return values


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (dotted key, default, what it is) of every knob, for `--help` and the docs."""
    rows: list[tuple[str, str, str]] = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            rows += describe(typing.cast(type, kind), f"{prefix}{f.name}.")
            continue
        factory: Any = f.default_factory
        default: Any = factory() if factory is not MISSING else f.default
        if default is MISSING:
            default = "required"
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        about = f.metadata["about"] + (f" [{' | '.join(map(str, choices))}]" if choices else "")
        rows.append((prefix + f.name, str(default), about))
    return rows


def _coerce(value: Any, kind: Any, metadata: Mapping[str, Any], where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        # YAML reads a bare off, on, yes or no as a boolean; where the choices have the word, the word was meant.
        if isinstance(value, bool) and (word := "on" if value else "off") in args:
            value = word
        if value not in args or isinstance(value, bool):
            raise ConfigError(
                f"{where} must be one of {', '.join(map(repr, args))}, not {value!r}"
                + did_you_mean(str(value), [str(a) for a in args])
            )
        return value
    if origin is list:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not (items or metadata.get("may_be_empty")):
            raise ConfigError(f"{where} must be a list with at least one entry, not {value!r}")
        return [_coerce(item, args[0], {}, where) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a mapping, not {value!r}")
        if dataclasses.is_dataclass(args[1]):
            file, _, key = where.rpartition(": ")
            return {str(k): build(typing.cast(type, args[1]), v, file, f"{key}.{k}.") for k, v in value.items()}
        return {str(k): _coerce(v, args[1], {}, f"{where}.{k}") for k, v in value.items()}
    assert not isinstance(kind, types.UnionType)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigError(f"{where} must be {names[kind]}, not {value!r}")
    if kind in (int, float):
        low, high = metadata.get("low"), metadata.get("high")
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            bounds = "finite" if low is None else f"at least {low:g} and finite"
            bounds = bounds if high is None else f"between {low:g} and {high:g}"
            raise ConfigError(f"{where} must be {bounds}, not {value!r}")
    if kind is str and not value and metadata.get("about") and "empty" not in metadata["about"]:
        raise ConfigError(f"{where} is empty")
    return value
