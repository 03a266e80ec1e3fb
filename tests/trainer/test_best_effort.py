"""Files that training must not end for."""

from __future__ import annotations

import errno
from pathlib import Path

import structlog

from trainer.best_effort import BestEffort


def test_a_full_disk_is_said_once_and_said_again_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    file = BestEffort(path)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            file(full)
        for text in ("one", "two"):
            file(lambda where, text=text: where.write_text(text))  # type: ignore[misc]
        file(full)
    assert path.read_text() == "two"
    assert [one["event"] for one in logs] == [
        "not written, training goes on",
        "written again",
        "not written, training goes on",
    ]
    assert all(one["file"] == str(path) for one in logs)
    assert logs[0]["reason"] == "No space left on device"
