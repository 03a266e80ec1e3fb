"""A run's directory: only what is ours is removed, and never under a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.run.run_directory import open_run_directory
from trainer.run.status import ProducerStatus, write_status


def finish_a_run(root: Path, *, produced: int, resume: bool = False) -> None:
    with open_run_directory(root, resume=resume) as directory:
        write_status(directory.producer_status, ProducerStatus(state="done", impressions_produced=produced))
        directory.drain.touch()
        directory.verify.touch()
        (directory.root / "checkpoints" / "0001").mkdir(parents=True)
        directory.version_log.mkdir(exist_ok=True)


def test_new_run_removes_an_earlier_runs_files_and_nothing_else(tmp_path: Path) -> None:
    finish_a_run(tmp_path / "run", produced=5)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with open_run_directory(tmp_path / "run", resume=False) as directory:
        names = {path.name for path in directory.root.iterdir()}
        assert names == {"notes.txt", "run.json", "run.lock", "logs", "ready", "status", "control"}
        assert not directory.drain.exists()
        assert not directory.producer_status.exists()


def test_a_run_whose_stream_stays_is_not_removed_by_the_next_one(tmp_path: Path) -> None:
    finish_a_run(tmp_path / "run", produced=5)
    with (
        pytest.raises(ConfigError, match="Go on from them with --resume"),
        open_run_directory(tmp_path / "run", resume=False, stream_stays=True),
    ):
        pass
    with open_run_directory(tmp_path / "run", resume=True, stream_stays=True) as directory:
        assert (directory.root / "checkpoints" / "0001").is_dir()
        (directory.root / "checkpoints" / "0001").rmdir()
    with open_run_directory(tmp_path / "run", resume=False, stream_stays=True) as directory:
        assert not directory.version_log.exists()


def test_resumed_run_keeps_the_state_and_counts_what_was_produced_before(tmp_path: Path) -> None:
    finish_a_run(tmp_path / "run", produced=5)
    with open_run_directory(tmp_path / "run", resume=True) as directory:
        assert (directory.root / "checkpoints" / "0001").is_dir()
        assert directory.version_log.is_dir()
        assert not directory.drain.exists()
        assert not directory.verify.exists()
        marker = directory.read_marker()
        assert marker is not None
        assert marker.produced_before == 5
        write_status(directory.producer_status, ProducerStatus(state="done", impressions_produced=7))
    with open_run_directory(tmp_path / "run", resume=True) as directory:
        marker = directory.read_marker()
        assert marker is not None
        assert marker.produced_before == 12


@pytest.mark.parametrize("resume", [False, True])
def test_directory_that_no_run_made_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "precious").write_text("x")
    with (
        pytest.raises(ConfigError, match="nothing was touched"),
        open_run_directory(tmp_path, resume=resume),
    ):
        pass
    assert (tmp_path / "logs" / "precious").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.parametrize("marker", [b"", b"{}", b'{"kind": "other"}'])
def test_marker_of_something_else_is_not_ours(tmp_path: Path, marker: bytes) -> None:
    (tmp_path / "run.json").write_bytes(marker)
    with pytest.raises(ConfigError, match=r"run\.json"), open_run_directory(tmp_path, resume=False):
        pass
    assert (tmp_path / "run.json").read_bytes() == marker


def test_directory_in_use_is_refused_and_stays_whole(tmp_path: Path) -> None:
    with open_run_directory(tmp_path / "run", resume=False) as directory:
        directory.verify.touch()
        with (
            pytest.raises(ConfigError, match="another run is using"),
            open_run_directory(tmp_path / "run", resume=False),
        ):
            pass
        assert directory.verify.exists()
    with open_run_directory(tmp_path / "run", resume=False) as directory:
        assert not directory.verify.exists()


def test_file_in_the_directorys_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with (
        pytest.raises(ConfigError, match="nothing was touched"),
        open_run_directory(tmp_path / "run", resume=False),
    ):
        pass
    assert (tmp_path / "run").read_text() == "a file"


def test_resume_without_an_earlier_run_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"--resume: .*typo holds no earlier run"),
        open_run_directory(tmp_path / "typo", resume=True),
    ):
        pass
    assert not (tmp_path / "typo").exists()


def test_what_tells_the_trainer_to_end_is_removed_also_after_a_run_that_failed(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(ValueError, match="failed"),
        open_run_directory(tmp_path / "run", resume=False) as directory,
    ):
        directory.drain.touch()
        directory.broken_off.touch()
        raise ValueError("failed")
    assert list(directory.drain.parent.iterdir()) == []
