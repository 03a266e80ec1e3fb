"""Scores as plain Python: a function of what is known of a row, compiled into the table's kernels.

    @score
    def recent_clicks(old, shows, positives, age_s, updates):
        return old * 0.5 ** (age_s / 3600.0) + positives

    IdTable(policy, score=recent_clicks)  # or ScoreConfig(kind="my_package.my_module:recent_clicks")

The function gets the value it returned at the row's last sighting (`old`, float, 0.0 for a new row), this
sighting's shows and positives (ints; both 0 when rows are only compared), the seconds since the row was last
seen (int, at least 0) and its shows since it was admitted, these ones included (int). It returns a finite
float; the lowest leaves first. What it returns at a sighting is kept as float32.

A kind with a colon is imported by name and compiled, as any plug-in is: whoever writes the configuration
chooses code that runs here. Shipped names import nothing.

A score must be pure: it may use numbers, math, and functions of the same sort, its module's or others'. It is
compiled, tried on a grid of arguments and refused with its file and line when the table is made. What is
compiled is kept on disk, under all that it was made of (score_fingerprint.py): a constant that changes, in
whatever module, is a new score.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import math
import re
from collections import namedtuple
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba.core.errors import NumbaError
from numba.extending import overload

from feature_eviction.errors import ScoreError
from feature_eviction.jit import compiled
from feature_eviction.policy import SHIPPED_SCORES, ScoreConfig
from feature_eviction.score_fingerprint import fingerprint
from feature_eviction.shipped_scores import SHOW_CLICK, ShippedScore, decayed_floor, shipped, shipped_score

ARGUMENTS = ("old", "shows", "positives", "age_s", "updates")
FLOAT32_MAX = float(np.finfo(np.float32).max)

_SIGHTINGS_TRIED = ((0, 0), (1, 0), (1, 1), (7, 3), (2**20, 2**20))
_AGES_S_TRIED = (0, 1, 59, 86_400, 400 * 86_400, 2**32 - 1)
_UPDATES_TRIED = (1, 2, 1000, 2**32 - 1)
_ROUNDS_TRIED = 3
"""The score's own answers are given back to it as `old` so many times."""

_compiled_by_tag: dict[str, Any] = {}


class Score:
    """A user's score function; still callable as plain Python."""

    def __init__(self, function: Callable[..., float]) -> None:
        if not isinstance(function, FunctionType):
            raise ScoreError(f"@score: a plain Python function expected, found {type(function).__name__}")
        self.function = function

    @property
    def name(self) -> str:
        """As ScoreConfig.kind names it."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    @property
    def place(self) -> str:
        code = self.function.__code__
        return f"{code.co_filename}:{code.co_firstlineno}: score '{self.function.__name__}'"

    def __call__(self, old: float, shows: int, positives: int, age_s: int, updates: int) -> float:
        worth: float = self.function(old, shows, positives, age_s, updates)
        return worth


def score(function: Callable[..., float]) -> Score:
    """Make a function usable as a table's score; it is checked when a table is made of it."""
    return Score(function)


def apply_score(score: Any, old: Any, shows: Any, positives: Any, age_s: Any, updates: Any) -> Any:
    """What the kernels call; `score` is a ShippedScore, or the tag of a compiled user score."""
    raise NotImplementedError("apply_score has a compiled form only")


@overload(apply_score, jit_options={"forceinline": True})
def _apply_score(score: Any, old: Any, shows: Any, positives: Any, age_s: Any, updates: Any) -> Any:
    if score.instance_class is ShippedScore:

        def shipped_form(score: Any, old: Any, shows: Any, positives: Any, age_s: Any, updates: Any) -> Any:
            return shipped_score(score, old, shows, positives, age_s, updates)

        return shipped_form
    function = _compiled_by_tag[score.instance_class.__name__]

    def user_form(score: Any, old: Any, shows: Any, positives: Any, age_s: Any, updates: Any) -> Any:
        return float(function(old, shows, positives, age_s, updates))

    return user_form


def floor_of_score(score: Any, old: Any, age_s: Any) -> Any:
    """A number that apply_score without sightings does not fall below, where one is cheaper than that."""
    raise NotImplementedError("floor_of_score has a compiled form only")


@overload(floor_of_score, jit_options={"forceinline": True})
def _floor_of_score(score: Any, old: Any, age_s: Any) -> Any:
    if score.instance_class is ShippedScore:

        def shipped_form(score: Any, old: Any, age_s: Any) -> Any:
            return decayed_floor(score, old, age_s) if score.kind <= SHOW_CLICK else -math.inf

        return shipped_form

    def user_form(score: Any, old: Any, age_s: Any) -> Any:
        return -math.inf

    return user_form


def resolve_score(config: ScoreConfig, given: Score | None) -> Any:
    """The kernels' argument for a configured score: checked, compiled, tried.

    Raises: ScoreError for a function that cannot be imported, has another signature, cannot be compiled or
    returns something else than finite numbers.
    """
    if given is None:
        if config.kind in SHIPPED_SCORES:
            return shipped(config)
        given = _imported(config.kind)
    _check_signature(given)
    tag = "UserScore_" + hashlib.sha256(fingerprint(given.function, place=given.place)).hexdigest()[:24]
    if tag not in _compiled_by_tag:
        function = _compile(given)
        _try(given, function)
        _compiled_by_tag[tag] = function
    return _tag_class(tag)(0)


def _imported(kind: str) -> Score:
    module_name, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ScoreError(f"score kind '{kind}': {error}. Name it as importable.module:function.") from error
    if isinstance(found, Score):
        return found
    raise ScoreError(
        f"score kind '{kind}': a function with the decorator @score expected, found {type(found).__name__}"
    )


def _check_signature(given: Score) -> None:
    parameters = inspect.signature(given.function).parameters.values()
    names = tuple(one.name for one in parameters)
    plain = all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)
    if names != ARGUMENTS or not plain:
        raise ScoreError(f"{given.place} must take ({', '.join(ARGUMENTS)}), found ({', '.join(names)})")


def _compile(given: Score) -> Any:
    function = compiled(given.function)
    integer = numba.int64
    try:
        function.compile((numba.float64, integer, integer, integer, integer))
    except NumbaError as error:
        lines = re.findall(r"line (\d+)", str(error))
        where = f"{given.function.__code__.co_filename}:{lines[-1]}: " if lines else f"{given.place}: "
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ScoreError(
            f"{where}score '{given.function.__name__}' cannot be compiled: {reason.strip()} {_tail(error)}"
        ) from error
    (overloaded,) = function.overloads.values()
    returned = overloaded.signature.return_type
    if not isinstance(returned, numba.types.Float | numba.types.Integer | numba.types.Boolean):
        raise ScoreError(f"{given.place} must return a number on every path, found {returned}")
    return function


def _tail(error: NumbaError) -> str:
    """Numba's own lines that say what was not understood."""
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return " / ".join(lines[:6])


def _try(given: Score, function: Any) -> None:
    olds = {0.0}
    for _ in range(_ROUNDS_TRIED):
        answers = set()
        for old, (shows, positives), age_s, updates in itertools.product(
            sorted(olds), _SIGHTINGS_TRIED, _AGES_S_TRIED, _UPDATES_TRIED
        ):
            arguments = (old, shows, positives, age_s, updates)
            try:
                answer = float(function(*arguments))
            except (ArithmeticError, ValueError) as error:
                raise ScoreError(f"{given.place}{_call(arguments)} raises {error!r}") from error
            if not math.isfinite(answer) or abs(answer) > FLOAT32_MAX:
                raise ScoreError(f"{given.place}{_call(arguments)} returns {answer}, which orders no rows")
            answers.add(float(np.float32(answer)))
        olds = {min(answers), max(answers), 0.0}


def _call(arguments: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{n}={v}" for n, v in zip(ARGUMENTS, arguments, strict=True)) + ")"


def _tag_class(tag: str) -> Any:
    """A type of its own for each score, so that kernels are compiled for each; found again by its name."""
    if tag not in globals():
        globals()[tag] = namedtuple(tag, ["unused"], module=__name__)
    return globals()[tag]


def __getattr__(name: str) -> Any:
    """Kernels kept on disk name the types of scores that this process may not have made yet."""
    if name.startswith("UserScore_"):
        return _tag_class(name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
