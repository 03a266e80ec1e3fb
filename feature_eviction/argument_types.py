"""What the arguments of commands may be; a wrong one is refused before anything is begun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument: a whole number that is not below `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, found {text}")
        return int(text)

    return read


def plot_path(text: str) -> Path:
    """The type of an argument --plot, looked at before what it plots is computed, which may take long.

    Raises: argparse.ArgumentTypeError for another ending than .svg or .png, and where no file can be written.
    """
    path = Path(text)
    if path.suffix.lower() not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{path}: expected a file that ends in .svg or .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: cannot be written")
    return path
