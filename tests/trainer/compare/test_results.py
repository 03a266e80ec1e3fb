"""A finished run is not done again; one that is torn, or of other data or settings, is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from trainer.compare import run
from trainer.compare.results import Results, of_other_code
from trainer.compare.run import DECIDING, RunResult, code_digest, digest_of_code

ROOT = Path(run.__file__).parent.parent.parent

HAVE_OTHER_DIGESTS = ("trainer/config/", "trainer/data/", "trainer/compare/plan", "trainer/compare/settings")
"""Their results, the configuration and the columns, are in each result's own digests."""
DECIDE_NOTHING = (
    *("trainer/publish/", "trainer/run/", "param_server/", "proto/"),
    *("trainer/errors", "trainer/failpoints", "trainer/compare/worker"),
)


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
    for package in ("trainer", "feature_eviction"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_of_code(tmp_path)
    assert before == digest_of_code(ROOT)
    file = min(tmp_path.glob(pattern))
    file.write_text(file.read_text() + "\n# changed\n")
    assert digest_of_code(tmp_path) != before


def test_all_that_a_worker_imports_decides_a_result_or_is_known_not_to():
    """A module that is new there has to be put on one side or the other."""
    show = (
        "import sys, trainer.compare.worker; files = [getattr(m, '__file__', None) for m in "
        "sys.modules.values()]; print(*files, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    packages = tuple(f"{ROOT}/{name}/" for name in ("trainer", "feature_eviction", "param_server", "proto"))
    imported = {
        str(Path(line).relative_to(ROOT))
        for line in done.stdout.splitlines()
        if line.startswith(packages) and not line.endswith("__init__.py")
    }
    assert "trainer/recommender.py" in imported
    deciding = {str(file.relative_to(ROOT)) for pattern in DECIDING for file in ROOT.glob(pattern)}
    assert [
        file for file in imported - deciding if not file.startswith((*HAVE_OTHER_DIGESTS, *DECIDE_NOTHING))
    ] == []
    assert [file for file in deciding if file.startswith((*HAVE_OTHER_DIGESTS, *DECIDE_NOTHING))] == []


def test_runs_of_other_model_code_are_named(result):
    assert of_other_code([result, replace(result, name="old", code="another")]) == ["old"]
