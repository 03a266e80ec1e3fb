"""A finished run is not done again; one that is torn, or of other data or settings, is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from trainer.compare import run
from trainer.compare.results import Results, of_other_code
from trainer.compare.run import DECIDING, RunResult, code_digest, digest_of_code

PACKAGE = Path(run.__file__).parent.parent


@pytest.fixture
def spec(make_specs):
    return make_specs()[0]


@pytest.fixture
def result(spec):
    return RunResult(
        name=spec.name, run_hash=spec.hash(), code=code_digest(), data_digest=spec.facts.digest, cells=[],
        validation=[0.6], best_epoch=1, num_trained=1, cost_us=1.0, parameters=1, cpu_s=1.0, wall_s=1.0,
    )  # fmt: skip


def test_a_saved_run_is_finished(tmp_path, spec, result):
    results = Results(tmp_path / "runs")
    assert results.finished(spec) is None
    results.save(spec, result)
    assert Results(tmp_path / "runs").finished(spec) == result
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["pepnet-seed1.json"]


@pytest.mark.parametrize("left", [0, 10, -1])
def test_a_torn_result_is_done_again(tmp_path, spec, result, left):
    results = Results(tmp_path)
    results.save(spec, result)
    path = results.path(spec)
    path.write_bytes(path.read_bytes().rstrip()[:left])
    assert results.finished(spec) is None


@pytest.mark.parametrize("field", ["run_hash", "data_digest", "format"])
def test_a_result_of_something_else_is_done_again(tmp_path, spec, result, field):
    results = Results(tmp_path)
    results.save(spec, replace(result, **{field: 99 if field == "format" else "another"}))
    assert results.finished(spec) is None


@pytest.mark.parametrize("pattern", DECIDING)
def test_a_change_of_code_that_decides_a_result_is_seen(tmp_path, pattern):
    package = tmp_path / "trainer"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "data", "run", "stream"))
    before = digest_of_code(package)
    assert before == digest_of_code(PACKAGE)
    file = min(package.glob(pattern))
    file.write_text(file.read_text() + "\n# changed\n")
    assert digest_of_code(package) != before


def test_runs_of_other_model_code_are_named(result):
    assert of_other_code([result, replace(result, name="old", code="another")]) == ["old"]
