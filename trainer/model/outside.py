"""A model from outside this package: `module:Class` imported, built, and looked over before it trains.

Shapes: B batch, E width of the concatenated embedding, T tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError, FreshetError

_NUM_TRIED = 2


def import_builder(name: str) -> Callable[..., Any]:
    """The class or function that `module:Class` names.

    Raises: ConfigError if the module cannot be imported or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    where = f"model.name '{name}'"
    if not module_name or not attribute:
        raise ConfigError(f"{where}: expected module:Class, for example my_package.my_model:MyModel")
    with _code_from_outside(f"{where}: the module cannot be imported"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{where}: there is no module '{error.name}'. Start from the folder that holds it, or put "
                "that folder on PYTHONPATH, for every process of the run."
            ) from error
    builder = getattr(module, attribute, None)
    if not callable(builder):
        there = ", ".join(sorted(one for one in vars(module) if not one.startswith("_"))) or "nothing"
        raise ConfigError(f"{where}: the module has no class or function '{attribute}'; it has {there}")
    found: Callable[..., Any] = builder
    return found


def code_of(name: str) -> str:
    """A digest of the module's file, but not of what it imports; raises as import_builder does."""
    import_builder(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def build_outside(build: Callable[[], Any], *, name: str, embedding_width: int, num_tasks: int) -> nn.Module:
    """What `build` makes, looked over before it trains.

    Raises: ConfigError naming the model and what fails, or what training or publishing it would trip over.
    """
    with _code_from_outside(f"model '{name}': it cannot be built"):
        model = build()
    check_model(model, name=name, embedding_width=embedding_width, num_tasks=num_tasks)
    found: nn.Module = model
    return found


@contextlib.contextmanager
def _code_from_outside(what: str) -> Iterator[None]:
    """Whatever somebody else's code raises becomes one line that says where it was raised."""
    try:
        yield
    except FreshetError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {type(error).__name__}: {error}{_place_of(error)}") from error


def _place_of(error: Exception) -> str:
    """The last line of the code from outside that led to it, if any did."""
    ours = str(Path(__file__).parent.parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<"))
        and "site-packages" not in frame.filename
        and frame.filename not in (importlib.__file__, contextlib.__file__)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def check_model(model: Any, *, name: str, embedding_width: int, num_tasks: int) -> None:
    """Take two impressions through the model and look at what it keeps and answers.

    Raises: ConfigError naming the model and what training or publishing it would trip over.
    """
    where = f"model '{name}'"
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{where}: expected a torch.nn.Module, found {type(model).__name__}")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ConfigError(f"{where}: it has no parameters to train")
    for key, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ConfigError(f"{where}: parameter '{key}' is {parameter.dtype}, expected float32")
    kept = sorted(set(model.state_dict()) - set(parameters))
    if kept:
        raise ConfigError(
            f"{where}: '{kept[0]}' is a buffer of its state. Only parameters are saved and published: make "
            "it a parameter, or register the buffer with persistent=False if it never changes."
        )
    domain_B = torch.zeros(_NUM_TRIED, dtype=torch.int64) if getattr(model, "uses_domain", False) else None
    forward = _code_from_outside(f"{where}: its forward fails with two impressions")
    with forward, torch.random.fork_rng(devices=[]), torch.no_grad():
        logits_BT = model(torch.zeros(_NUM_TRIED, embedding_width), domain_B)
    found = tuple(logits_BT.shape) if isinstance(logits_BT, torch.Tensor) else type(logits_BT).__name__
    if found != (_NUM_TRIED, num_tasks):
        raise ConfigError(
            f"{where}: expected logits of shape {(_NUM_TRIED, num_tasks)} (impressions, tasks), found {found}"
        )
