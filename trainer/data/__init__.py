"""Where impressions come from: the synthetic stream and published recordings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.config import Config
from trainer.stream.columns import Impressions

if TYPE_CHECKING:
    Source = Iterator[Impressions] | Iterator[tuple[Impressions, npt.NDArray[np.float32]]]


def impression_source(config: Config, *, data: Path | None) -> Source:
    """Batches of one record each: of the recording at `data`, else of the synthetic stream with the truth.

    Raises: DataError naming the file and what it lacks.
    """
    if data is not None:
        from trainer.data.kuairand import KuaiRandReader

        recording: Iterator[Impressions] = KuaiRandReader(data, config.schema).batches(
            config.produce.record_impressions
        )
        return recording
    from trainer.data.synthetic import SyntheticStream

    return SyntheticStream(config).batches(config.produce.record_impressions)
