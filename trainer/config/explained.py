"""What msgspec refuses in a configuration, with what would have been right: the choices, the closest key."""

from __future__ import annotations

import difflib
import re
from typing import Any

import msgspec
from msgspec import inspect

_BAD_CHOICE = re.compile(r"^Invalid enum value .* - at `(?P<path>\$.*)`$", re.DOTALL)
_UNKNOWN_KEY = re.compile(
    r"^Object contains unknown field `(?P<key>[^`]*)`(?: - at `(?P<path>\$.*)`)?$", re.DOTALL
)
_ARRAYS = inspect.ListType | inspect.VarTupleType | inspect.SetType


def explained(error: msgspec.MsgspecError, *, of: type[Any]) -> str:
    """The error's own words, and behind them what may stand there, where that is known.

    Args: of: the type that was decoded.
    """
    text = str(error)
    if found := _BAD_CHOICE.match(text):
        kind = _at(found["path"], inspect.type_info(of))
        if isinstance(kind, inspect.LiteralType):
            return f"{text}: expected one of {', '.join(map(str, kind.values))}"
    if found := _UNKNOWN_KEY.match(text):
        kind = _at(found["path"] or "$", inspect.type_info(of))
        if isinstance(kind, inspect.StructType):
            keys = [field.encode_name for field in kind.fields]
            close = difflib.get_close_matches(found["key"], keys, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(keys)}"
            return f"{text}: {hint}"
    return text


def _at(path: str, kind: inspect.Type) -> inspect.Type | None:
    """The type at msgspec's path, `$.schema.features[...].role`; None where it leads nowhere."""
    current: inspect.Type | None = _not_none(kind)
    for part in path.split(".")[1:]:
        name, *indices = part.split("[")
        if not isinstance(current, inspect.StructType):
            return None
        field = next((one for one in current.fields if one.encode_name == name), None)
        current = None if field is None else _not_none(field.type)
        for _ in indices:
            current = _not_none(current.item_type) if isinstance(current, _ARRAYS) else None
    return current


def _not_none(kind: inspect.Type) -> inspect.Type | None:
    """Of `X | None` the X; None for unions of more."""
    if not isinstance(kind, inspect.UnionType):
        return kind
    kinds = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
    return kinds[0] if len(kinds) == 1 else None
