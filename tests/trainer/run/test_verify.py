"""The arithmetic of the comparison and the reading of the trainer's examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from param_server.client import Prediction, Version
from trainer.errors import DataError
from trainer.run.verify import Expected, compare, load_expected


class Answering:
    """Answers from a table of outputs and remembers what it was asked."""

    def __init__(self, **outputs: list[float]) -> None:
        self.outputs = {name: np.array(values, np.float32) for name, values in outputs.items()}
        self.asked: dict[str, npt.NDArray[Any]] = {}

    def predict(self, inputs: dict[str, npt.NDArray[Any]]) -> Prediction:
        self.asked = inputs
        return Prediction(outputs=self.outputs, version=Version(2, 5), age_ms=3)


def expected(**outputs: list[float]) -> Expected:
    arrays = {name: np.array(values, np.float32) for name, values in outputs.items()}
    return Expected(Version(2, 5), {"user_id": np.arange(2)}, arrays)


def test_largest_difference_over_all_tasks_is_found() -> None:
    replica = Answering(click=[0.5, 0.25], like=[0.125, 0.75], other=[9.0, 9.0])
    found = compare(replica, expected(click=[0.5, 0.25], like=[0.125, 0.5]))
    assert (found.max_abs_diff, found.predictions_checked, found.version) == (0.25, 4, Version(2, 5))
    assert list(replica.asked) == ["user_id"]


def test_equal_predictions_differ_by_nothing() -> None:
    assert compare(Answering(click=[0.1, 0.2]), expected(click=[0.1, 0.2])).max_abs_diff == 0.0


@pytest.mark.parametrize("values", [[float("nan"), 0.2], [0.1, float("nan")]])
def test_prediction_that_is_not_a_number_is_never_taken_for_equal(values: list[float]) -> None:
    assert np.isnan(compare(Answering(click=values), expected(click=[0.1, 0.2])).max_abs_diff)


def test_missing_task_and_wrong_shape_are_errors() -> None:
    with pytest.raises(DataError, match=r"gives no 'like'; it gives \['click'\]"):
        compare(Answering(click=[0.1, 0.2]), expected(like=[0.1, 0.2]))
    with pytest.raises(DataError, match=r"shape \(1,\), expected \(2,\)"):
        compare(Answering(click=[0.1]), expected(click=[0.1, 0.2]))


def test_examples_are_read_back_as_the_trainer_wrote_them(tmp_path: Path) -> None:
    tensors = {
        "in.tags": np.array([4, 5, 6]),
        "in.tags.lengths": np.array([1, 2], np.int32),
        "out.click": np.array([0.5, 0.25], np.float32),
    }
    save_file(tensors, tmp_path / "verify.safetensors", metadata={"version": "3.41"})
    found = load_expected(tmp_path / "verify.safetensors")
    assert found.version == Version(3, 41)
    assert sorted(found.inputs) == ["tags", "tags.lengths"]
    assert found.inputs["tags.lengths"].dtype == np.int32
    np.testing.assert_array_equal(found.outputs["click"], np.array([0.5, 0.25], np.float32))


@pytest.mark.parametrize("metadata", [None, {"version": "41"}, {"version": "a.b"}])
def test_examples_without_a_version_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {"in.a": np.zeros(1, np.float32), "out.a": np.zeros(1, np.float32)}
    save_file(tensors, tmp_path / "verify.safetensors", metadata=metadata)
    with pytest.raises(DataError, match="version"):
        load_expected(tmp_path / "verify.safetensors")


def test_missing_or_damaged_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_expected(tmp_path / "verify.safetensors")
    (tmp_path / "verify.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(DataError, match="cannot be read"):
        load_expected(tmp_path / "verify.safetensors")
