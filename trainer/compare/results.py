"""Finished runs on disk: one JSON a run, so that a comparison that was stopped goes on where it was."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from trainer.compare.plan import RunSpec
from trainer.compare.run import RESULT_FORMAT, RunResult, code_digest


class Results:
    """The folder of one comparison's runs; one writer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, spec: RunSpec) -> Path:
        return self._folder / f"{spec.name}.json"

    def finished(self, spec: RunSpec) -> RunResult | None:
        """The result, if it is whole and of the same configuration and data; else the run is to be done."""
        try:
            result = msgspec.json.decode(self.path(spec).read_bytes(), type=RunResult)
        except (FileNotFoundError, msgspec.MsgspecError):
            # Not there, torn, or of another release: it is made anew, as if it were not there.
            return None
        same = result.format == RESULT_FORMAT and result.run_hash == spec.hash()
        return result if same and result.data_digest == spec.facts.digest else None

    def save(self, spec: RunSpec, result: RunResult) -> None:
        """Whole or not at all."""
        path = self.path(spec)
        half_written = path.with_suffix(f".{os.getpid()}.part")
        half_written.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
        os.replace(half_written, path)


def of_other_code(results: list[RunResult]) -> list[str]:
    """The runs that were made by other code than the one at hand: to be known, not to be hidden."""
    return sorted(result.name for result in results if result.code != code_digest())
