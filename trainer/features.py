"""From impressions to the keys of the tables: classes, buckets, jagged lengths.

Shapes: B rows of the (padded) batch, L keys of one table, F features of one table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_eviction import make_keys
from trainer.config.schema import DOMAIN_SOURCE, USER_ID_SOURCE, FeatureConfig, SchemaConfig
from trainer.model.layout import FeatureLayout
from trainer.stream.columns import Impressions


@dataclass(frozen=True, slots=True)
class TableKeys:
    """All keys that one batch brings to one table, feature after feature, row after row."""

    table: str
    keys_L: npt.NDArray[np.int64]
    positives_L: npt.NDArray[np.int32]
    """1 where the impression that brings the key is positive."""
    lengths_FB: npt.NDArray[np.int32]
    num_folded: int
    """Ids that were wider than 52 bits."""


class KeyMaker:
    """Turns impressions into keys by the schema."""

    def __init__(self, schema: SchemaConfig) -> None:
        self._layout = FeatureLayout.of(schema)
        self._positive_task = schema.task_names.index(schema.positive_task)

    def table_keys(self, impressions: Impressions, *, num_rows: int) -> list[TableKeys]:
        """One TableKeys a table, tables by ascending dim; rows beyond the impressions have no keys.

        Raises: ValueError if there are more impressions than rows.
        """
        num = len(impressions)
        if num > num_rows:
            raise ValueError(f"{num} impressions do not fit into a batch of {num_rows} rows")
        label_B, known_B = (
            impressions.labels_NT[:, self._positive_task],
            impressions.known_NT[:, self._positive_task],
        )
        positive_N = ((label_B > 0.5) & known_B).astype(np.int32)
        tables: list[TableKeys] = []
        for table in dict.fromkeys(feature.table for feature in self._layout.features):
            features = [feature for feature in self._layout.features if feature.table == table]
            lengths_FB = np.zeros((len(features), num_rows), np.int32)
            keys, positives, num_folded = [], [], 0
            for index, feature in enumerate(features):
                ids_L, lengths_N = self._ids(feature, impressions)
                keys_L, num_folded_here = make_keys(ids_L, class_id=feature.class_id)
                num_folded += num_folded_here
                lengths_FB[index, :num] = 1 if lengths_N is None else lengths_N
                keys.append(keys_L)
                positives.append(positive_N if lengths_N is None else np.repeat(positive_N, lengths_N))
            tables.append(
                TableKeys(
                    table=table,
                    keys_L=np.concatenate(keys),
                    positives_L=np.concatenate(positives),
                    lengths_FB=lengths_FB,
                    num_folded=num_folded,
                )
            )
        return tables

    def _ids(
        self, feature: FeatureConfig, impressions: Impressions
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32] | None]:
        """The raw ids of a feature, and how many each impression has (None = one each)."""
        if feature.kind == "dense":
            return bucketise(impressions.dense[feature.name], edges=feature.bucket_edges), None
        if feature.name == USER_ID_SOURCE:
            return impressions.user_ids_N, None
        if feature.name == DOMAIN_SOURCE:
            return impressions.domain_N.astype(np.int64), None
        jagged = impressions.sparse[feature.name]
        return jagged.ids_L, jagged.lengths_N if feature.kind == "multi" else None


def bucketise(values_N: npt.NDArray[np.float32], *, edges: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """Bucket = number of edges <= value; NaN has the bucket after the last.

    Returns: int64 [N], in [0, len(edges) + 1].
    """
    bucket_N = np.searchsorted(np.asarray(edges, np.float64), values_N, side="right").astype(np.int64)
    bucket_N[np.isnan(values_N)] = len(edges) + 1
    return bucket_N


def request_columns(impressions: Impressions, schema: SchemaConfig) -> dict[str, npt.NDArray[np.generic]]:
    """The impressions as the inputs that a replica's Predict takes."""
    columns: dict[str, npt.NDArray[np.generic]] = {}
    for feature in schema.features:
        if feature.kind == "dense":
            columns[feature.name] = impressions.dense[feature.name]
        elif feature.name == USER_ID_SOURCE:
            columns[feature.name] = impressions.user_ids_N
        elif feature.name == DOMAIN_SOURCE:
            columns[feature.name] = impressions.domain_N.astype(np.int64)
        else:
            columns[feature.name] = impressions.sparse[feature.name].ids_L
            if feature.kind == "multi":
                columns[f"{feature.name}.lengths"] = impressions.sparse[feature.name].lengths_N
    return columns
