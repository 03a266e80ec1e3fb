"""A virtual environment of its own for a peer whose packages the project's environment does not want."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALL_LIMIT_S = 1_800


class PeerMissingError(Exception):
    """The environment cannot be made here; says what the installer said."""


def environment(folder: Path, requirements: Sequence[str], *, install: bool = True) -> Path:
    """Its interpreter; made first if the folder has none with exactly these requirements.

    Args: requirements: pinned, as pip takes them; install: whether it may be made.
    Raises: PeerMissingError if it is not there and cannot or may not be made.
    """
    python = folder / "bin" / "python"
    made_of = folder / "made_of.txt"
    wanted = "\n".join(requirements) + "\n"
    if made_of.exists() and made_of.read_text() == wanted:
        return python
    if not install:
        raise PeerMissingError(f"{folder} has not {', '.join(requirements)}, and nothing may be installed")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-3:]
            raise PeerMissingError(f"{' '.join(command[1:4])} ended with {done.returncode}: {' '.join(said)}")
    # Written last: an installation that was broken off is begun anew.
    made_of.write_text(wanted)
    return python
