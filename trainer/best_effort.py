"""Files that tell of training, and that training must not end for: a disk may be full for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger()


class BestEffort:
    """Writes one file; a failure is logged, once until one succeeds again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failed = False

    def __call__(self, write: Callable[[Path], None]) -> None:
        try:
            write(self.path)
        except OSError as error:
            if not self._failed:
                log.warning("not written, training goes on", file=str(self.path), reason=error.strerror)
            self._failed = True
            return
        if self._failed:
            log.info("written again", file=str(self.path))
        self._failed = False
