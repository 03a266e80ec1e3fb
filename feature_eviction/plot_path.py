"""Where a command's plot goes, looked at before what it plots is computed, which may take long."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def plot_path(text: str) -> Path:
    """The type of an argument --plot.

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
