"""Predict: one request, one version: keys → rows → pooled embeddings → program → probabilities.

Shapes: B impressions; L ids of one multi feature; D a feature's dim; E the width of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.keys import make_keys
from feature_eviction.slot_map import SlotMap
from param_server.errors import RequestError, UnavailableError
from param_server.manifest import Version
from param_server.request_keys import FeatureKeys, domain_indices, request_keys
from param_server.serving_model import ServingModel
from param_server.serving_store import Gathered, ServingStore
from param_server.signature import DOMAIN_FEATURE, ServingSignature

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """outputs: task -> float32 [B], all from `version`; num_unknown: ids that had no row."""

    outputs: dict[str, Floats]
    version: Version
    model: ServingModel
    num_unknown: int


def answer(store: ServingStore, inputs: dict[str, Array]) -> Answer:
    """Predict from whatever version is live, and from that one alone.

    Raises: RequestError naming the input; UnavailableError while there is no version with a model.
    """
    signature, keys, batch = _read(store.model, inputs)
    while True:
        gathered = store.gather(_keys_by_table(keys))
        model = gathered.model
        if model is not None and model.signature is signature:
            break
        # A version with another signature went live since: the request is read again by its rules.
        signature, keys, batch = _read(model, inputs)
    embeddings_BE, num_unknown = _pool(gathered, keys, batch=batch)
    domain_B = domain_indices(inputs[DOMAIN_FEATURE], signature.domains) if model.reads_domain else None
    no_rows_BT = np.zeros((0, len(signature.tasks)), np.float32)
    probabilities_BT = model.run(embeddings_BE, domain_B) if batch else no_rows_BT
    assert gathered.version is not None
    return Answer(
        outputs={task: probabilities_BT[:, index] for index, task in enumerate(signature.tasks)},
        version=gathered.version,
        model=model,
        num_unknown=num_unknown,
    )


def warm_up() -> None:
    """Load the compiled kernels behind a request, so that no request waits for them."""
    keys_N, _ = make_keys(np.zeros(1, np.int64), class_id=0)
    SlotMap(1).lookup(keys_N)


def _read(
    model: ServingModel | None, inputs: dict[str, Array]
) -> tuple[ServingSignature, list[FeatureKeys], int]:
    if model is None or model.signature is None:
        raise UnavailableError("this replica has not received a version with a model yet; try again soon")
    keys, batch = request_keys(model.signature, inputs)
    return model.signature, keys, batch


def _keys_by_table(keys: list[FeatureKeys]) -> dict[str, npt.NDArray[np.int64]]:
    by_table: dict[str, list[npt.NDArray[np.int64]]] = {}
    for one in keys:
        by_table.setdefault(one.feature.table, []).append(one.keys_L)
    return {table: np.concatenate(parts) for table, parts in by_table.items()}


def _pool(gathered: Gathered, keys: list[FeatureKeys], *, batch: int) -> tuple[Floats, int]:
    """The features' embeddings side by side, float32 [B, E], and the number of ids without a row."""
    embeddings_BE = np.empty((batch, sum(one.feature.dim for one in keys)), np.float32)
    start_by_table = dict.fromkeys(gathered.rows_ND, 0)
    num_unknown = column = 0
    for one in keys:
        table, dim = one.feature.table, one.feature.dim
        start = start_by_table[table]
        end = start_by_table[table] = start + len(one.keys_L)
        rows_LD = gathered.rows_ND[table][start:end]
        present_L = gathered.present_N[table][start:end]
        if not rows_LD.shape[1]:  # the version has no row in this table at all
            rows_LD = np.zeros((len(rows_LD), dim), np.float32)
        if rows_LD.shape[1] != dim:
            raise RequestError(
                f"input '{one.feature.name}': the model wants dim {dim}, table '{table}' of version "
                f"{gathered.version} has {rows_LD.shape[1]}"
            )
        num_unknown += len(present_L) - int(present_L.sum())
        pooled_BD = rows_LD if one.lengths_B is None else mean_present(rows_LD, present_L, one.lengths_B)
        embeddings_BE[:, column : column + dim] = pooled_BD
        column += dim
    return embeddings_BE, num_unknown


def mean_present(
    rows_LD: Floats, present_L: npt.NDArray[np.bool_], lengths_B: npt.NDArray[np.int64]
) -> Floats:
    """The mean of each impression's rows that are present; zeros where none is.

    Args: rows_LD: zeros where present_L is False; lengths_B: how many consecutive rows are whose.
    """
    sums_BD = np.zeros((len(lengths_B), rows_LD.shape[1]), np.float32)
    counts_B = np.zeros(len(lengths_B), np.float32)
    starts_B = np.cumsum(lengths_B) - lengths_B
    # reduceat gives an empty group the next group's first row, so empty groups are left out.
    filled_B = lengths_B > 0
    if filled_B.any():
        sums_BD[filled_B] = np.add.reduceat(rows_LD, starts_B[filled_B], axis=0)
        counts_B[filled_B] = np.add.reduceat(present_L.astype(np.float32), starts_B[filled_B])
    return (sums_BD / np.maximum(counts_B, 1)[:, None]).astype(np.float32, copy=False)
