"""Every key of a configuration as a markdown page, read off the classes that define them.

`python -m trainer config --reference > docs/configuration.md` makes the page; a test holds the two together.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo, fields

from trainer.config.config import Config

HEAD = """\
# Configuration

Every key of a run's TOML file; another one is refused. `python -m trainer config --preset quickstart` prints
a whole file, without the keys that are unset; `python -m trainer config --reference` prints this page.
"""

_TOML_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def reference(root: type[msgspec.Struct] = Config) -> str:
    """Returns: the page; a class that several sections share is described once, under all their names."""
    headers: dict[type[msgspec.Struct], list[str]] = {}
    for header, kind in _sections(root, ""):
        headers.setdefault(kind, []).append(header)
    parts = [HEAD, _section("Top level", root)]
    parts += [_section(", ".join(f"`{one}`" for one in found), kind) for kind, found in headers.items()]
    return "\n".join(parts)


def _sections(kind: type[msgspec.Struct], path: str) -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """The TOML header and class of each section below, in the order of the keys."""
    for field in fields(kind):
        inner = _section_class(field.type)
        if inner is not None:
            by_name = get_origin(field.type) is dict
            inner_path = f"{path}{field.name}{'.NAME' if by_name else ''}"
            yield f"[[{inner_path}]]" if get_origin(field.type) is tuple else f"[{inner_path}]", inner
            yield from _sections(inner, f"{inner_path}.")


def _section_class(kind: Any) -> type[msgspec.Struct] | None:
    """Of a section, a list of sections or sections by name; None for a plain value."""
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return one
    return None


def _section(title: str, kind: type[msgspec.Struct]) -> str:
    texts = _attribute_docstrings(kind)
    about = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(kind) or "").split("\n\n"))
    lines = [f"## {title}", "", about, "", "| key | type | default | |", "|---|---|---|---|"]
    for field in fields(kind):
        text = _text(kind, field, texts).replace("|", "\\|")
        lines.append(f"| `{field.name}` | {_type(field.type)} | {_default(field)} | {text} |")
    return "\n".join([*lines, ""])


def _text(kind: type[msgspec.Struct], field: FieldInfo, texts: dict[str, str]) -> str:
    """What the key does; of a section without words of its own, its class's first line."""
    if field.name in texts:
        return texts[field.name]
    inner = _section_class(field.type)
    if inner is not None:
        return (inspect.getdoc(inner) or "").splitlines()[0]
    raise AssertionError(f"{kind.__name__}.{field.name} has no docstring")


def _attribute_docstrings(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The string that follows an attribute in the source, on one line; inherited attributes included."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if owner is msgspec.Struct or not issubclass(owner, msgspec.Struct):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for attribute, below in itertools.pairwise(tree.body):
            match attribute, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _type(kind: Any) -> str:
    """The type in TOML's words."""
    inner = [one for one in get_args(kind) if one is not NoneType]
    if kind in _TOML_TYPES:
        return _TOML_TYPES[kind]
    if _section_class(kind) is kind:
        return "section"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in inner)
    if get_origin(kind) is tuple:
        return f"list of {_type(inner[0])}s"
    if get_origin(kind) is dict:
        return f"{_type(inner[1])} by name"
    return " or ".join(_type(one) for one in inner)


def _default(field: FieldInfo) -> str:
    if field.required:
        return "required"
    if field.default is None:
        return "unset"
    if isinstance(field.default, msgspec.Struct):
        return "its defaults"
    if field.default is msgspec.NODEFAULT:
        return "none"  # a table that each configuration gets anew
    return f"`{json.dumps(field.default)}`"
