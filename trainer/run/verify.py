"""Holds a replica's answers against the trainer's own, on the examples the trainer left behind.

The trainer writes `verify.safetensors` after its last version: tensors `in.<input>` (what a client would
send), `out.<task>` float32 [B] (its own predictions), and the version in the metadata.
B = impressions, T = tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from param_server.client import ParamServerError, Prediction, Version
from trainer.errors import DataError


class Predictor(Protocol):
    """A replica's client, or anything that answers as one."""

    def predict(self, inputs: dict[str, npt.NDArray[Any]]) -> Prediction: ...


@dataclass(frozen=True)
class Expected:
    """The trainer's examples: inputs by name, outputs by task (float32 [B])."""

    version: Version
    inputs: dict[str, npt.NDArray[Any]]
    outputs: dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Comparison:
    """One replica's answer against the trainer's."""

    version: Version
    predictions_checked: int
    """Numbers compared: B × T."""
    max_abs_diff: float
    """NaN where any of the numbers is one."""


def load_expected(path: Path) -> Expected:
    """Raises: DataError if the file is missing, damaged, or lacks the version, inputs or outputs."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: the trainer's examples cannot be read ({error})") from error
    inputs = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")}
    outputs = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("out.")}
    if "version" not in metadata or not inputs or not outputs:
        raise DataError(
            f"{path}: expected a 'version' in the metadata and tensors 'in.*' and 'out.*'; found metadata "
            f"{sorted(metadata)} and tensors {sorted(tensors)}"
        )
    try:
        return Expected(Version.parse(metadata["version"]), inputs, outputs)
    except ParamServerError as error:
        raise DataError(f"{path}: {error}") from error


def compare(predictor: Predictor, expected: Expected) -> Comparison:
    """Ask the replica for what the trainer has already answered.

    Raises: DataError if an output is missing or has another shape; what the predictor raises.
    """
    answer = predictor.predict(expected.inputs)
    checked, worst = 0, 0.0
    for task, wanted_B in expected.outputs.items():
        if task not in answer.outputs:
            raise DataError(f"the replica gives no '{task}'; it gives {sorted(answer.outputs)}")
        found_B = np.asarray(answer.outputs[task]).reshape(-1)
        if found_B.shape != wanted_B.shape:
            raise DataError(f"'{task}': the replica gives shape {found_B.shape}, expected {wanted_B.shape}")
        difference_B = np.abs(found_B.astype(np.float64) - wanted_B.astype(np.float64))
        checked += wanted_B.size
        # np.max lets a NaN through, Python's max would not.
        worst = float(np.max([worst, *difference_B]))
    return Comparison(answer.version, checked, worst)
