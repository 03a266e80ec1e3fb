"""All that decides what a user's score returns: under this, what is compiled of it is kept on disk.

Numba writes into compiled code the values of globals, of closed-over names and of the attributes of modules.
So each of them that the code reads is a part, by its value; a function under numba.njit by its own code, and
what that reads in turn. What numba itself has a form of (math, numpy) goes by its name. Anything else could
change without a trace here, and is refused.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from feature_eviction.errors import ScoreError

_OF_NUMBA = ("builtins", "cmath", "math", "numba", "numpy", "operator")
"""Packages of which numba compiles forms of its own; their constants do not change."""
_OURS = __name__.partition(".")[0]


def fingerprint(function: Callable[..., Any], *, place: str) -> bytes:
    """Equal bytes for functions of equal code that read equal values, in any process.

    Args: place: names the score in errors.
    Raises: ScoreError for something read whose value, or whose way into compiled code, is not known.
    """
    return repr(_Reader(place).function(function)).encode()


class _Reader:
    """What the functions of one score are and read, as tuples and strings."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._functions: list[Callable[..., Any]] = []

    def function(self, function: Callable[..., Any]) -> object:
        """Its code, its defaults and what it reads; of one met before, its number."""
        if function in self._functions:
            return self._functions.index(function)
        self._functions.append(function)
        code = function.__code__
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        closed_over = {name: cell.cell_contents for name, cell in cells}
        defaults = self._value(
            "a default", (function.__defaults__ or (), *(function.__kwdefaults__ or {}).items())
        )
        found: dict[tuple[bool, str], object] = {}
        for is_global, path in _paths_read(code):
            variables = function.__globals__ if is_global else closed_over
            if path[0] in variables:
                name, value = self._follow(path, variables[path[0]])
                # Not again: of a function read twice the number alone would be left.
                if (is_global, name) not in found:
                    found[is_global, name] = self._value(name, value)
        return _code_parts(code), defaults, sorted(found.items())

    def _follow(self, path: list[str], value: Any) -> tuple[str, Any]:
        """From module to attribute, as far as there are modules; the names passed, and what stands there."""
        passed = path[:1]
        for name in path[1:]:
            if not isinstance(value, ModuleType) or _is_of_numba(value):
                break
            if not hasattr(value, name):
                raise ScoreError(f"{self._place} uses '{'.'.join(passed)}.{name}', which is not there")
            value = getattr(value, name)
            passed.append(name)
        return ".".join(passed), value

    def _value(self, name: str, value: Any) -> object:
        if isinstance(value, bool | int | float | str | np.generic):
            return repr(value)
        if isinstance(value, tuple):
            return getattr(value, "_fields", ()), [self._value(name, one) for one in value]
        if isinstance(value, Dispatcher):
            self._check_cache(name, value)
            options = sorted((option, str(given)) for option, given in value.targetoptions.items())
            return options, self.function(value.py_func)
        if _is_of_numba(value):
            return value.__name__
        raise ScoreError(
            f"{self._place} uses '{name}', a {type(value).__name__}; numbers and functions under numba.njit "
            f"may be used, as name or module.name"
        )

    def _check_cache(self, name: str, value: Any) -> None:
        """Numba knows what it has kept by the function's file alone, whatever that reads of other modules."""
        package = value.py_func.__module__.partition(".")[0]
        if value.stats.cache_path is not None and package != _OURS:
            raise ScoreError(
                f"{self._place} uses '{name}', a function under numba.njit(cache=True), of which numba may "
                f"keep an old form. Leave cache=True out: the table keeps what is compiled for it"
            )


def _paths_read(code: CodeType) -> Iterator[tuple[bool, list[str]]]:
    """(is it global, name and attributes) of each variable read, as often as it is, inner functions' too."""
    instructions = [one for one in dis.get_instructions(code) if one.opname != "EXTENDED_ARG"]
    for place, one in enumerate(instructions):
        if one.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            path = [one.argval]
            for later in instructions[place + 1 :]:
                if later.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                path.append(later.argval)
            yield one.opname == "LOAD_GLOBAL", path
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _paths_read(constant)


def _code_parts(code: CodeType) -> object:
    constants = [_code_parts(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_exceptiontable


def _is_of_numba(value: Any) -> bool:
    """A module of those packages, or what stands there under its own name."""
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in _OF_NUMBA
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    return module.partition(".")[0] in _OF_NUMBA and getattr(sys.modules.get(module), name, None) is value
