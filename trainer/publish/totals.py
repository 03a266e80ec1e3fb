"""What a run has published so far, as the status shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.publish.version_parts import PartReport
from trainer.run.status import VersionTrace


@dataclass(slots=True)
class PublishTotals:
    """Over the run so far; only rank 0's are complete."""

    full: int = 0
    delta: int = 0
    rows_changed: int = 0
    rows_pushed: int = 0
    bytes_pushed: int = 0
    failed: int = 0
    held: int = 0
    """Versions that were due and that the quality gate held."""
    head: str = ""
    held_back: dict[str, int] = field(default_factory=dict)
    """Rows that were kept back, by reason, once for each version that kept them back."""

    def add(self, trace: VersionTrace, reports: list[PartReport]) -> None:
        """A version is durable. Args: reports: of every rank."""
        if trace.kind == "full":
            self.full += 1
        else:
            self.delta += 1
        self.rows_pushed += trace.num_rows
        self.bytes_pushed += trace.num_bytes
        self.head = f"{trace.generation}.{trace.sequence}"
        for report in reports:
            self.rows_changed += report.num_changed
            for reason, num in report.held_back.items():
                self.held_back[reason] = self.held_back.get(reason, 0) + num
