"""Request columns to keys: what a prediction request brings, checked and made into table keys.

Shapes: B impressions; L ids of one multi feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.keys import make_keys
from param_server.errors import RequestError
from param_server.signature import (
    DOMAIN_FEATURE,
    LENGTHS_SUFFIX,
    ServingSignature,
    SignatureFeature,
    feature_inputs,
)

BATCH_MAX = 1 << 16

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class FeatureKeys:
    """The keys of one feature; lengths_B is None where every impression has exactly one."""

    feature: SignatureFeature
    keys_L: npt.NDArray[np.int64]
    lengths_B: npt.NDArray[np.int64] | None


def request_keys(signature: ServingSignature, inputs: dict[str, Array]) -> tuple[list[FeatureKeys], int]:
    """Turn the columns of a request into keys, feature by feature in the signature's order.

    Args: inputs: int64 [B] for a single feature, int64 [L] and int32 [B] "<name>.lengths" for a multi
        one, float32 [B] for a dense one, bytes objects or int64 [B] for "domain".
    Returns: the keys and B.
    Raises: RequestError naming the input.
    """
    expected = {name for feature in signature.features for name, _, _ in feature_inputs(feature)}
    unknown = sorted(set(inputs) - expected)
    if unknown:
        raise RequestError(f"input '{unknown[0]}' is not one of the model's: {sorted(expected)}")
    missing = sorted(expected - set(inputs))
    if missing:
        raise RequestError(f"input '{missing[0]}' is missing")
    first = signature.features[0]
    batch = len(inputs[first.name + LENGTHS_SUFFIX if first.kind == "multi" else first.name])
    if batch > BATCH_MAX:
        raise RequestError(f"input '{first.name}': at most {BATCH_MAX} impressions a request, found {batch}")
    return [_feature_keys(signature, feature, inputs, batch=batch) for feature in signature.features], batch


def _feature_keys(
    signature: ServingSignature, feature: SignatureFeature, inputs: dict[str, Array], *, batch: int
) -> FeatureKeys:
    values = inputs[feature.name]
    if feature.kind == "multi":
        return _multi_keys(feature, values, inputs[feature.name + LENGTHS_SUFFIX], batch=batch)
    if len(values) != batch:
        raise RequestError(f"input '{feature.name}': expected {batch} values, found {len(values)}")
    if feature.kind == "dense":
        ids_B = _buckets(values, feature)
    elif feature.name == DOMAIN_FEATURE:
        ids_B = domain_indices(values, signature.domains)
    else:
        ids_B = _typed(values, np.int64, name=feature.name)
    keys_B, _ = make_keys(ids_B, class_id=feature.class_id)
    return FeatureKeys(feature=feature, keys_L=keys_B, lengths_B=None)


def _multi_keys(feature: SignatureFeature, ids: Array, lengths: Array, *, batch: int) -> FeatureKeys:
    ids_L = _typed(ids, np.int64, name=feature.name)
    lengths_B = _typed(lengths, np.int32, name=feature.name + LENGTHS_SUFFIX).astype(np.int64)
    where = f"input '{feature.name}{LENGTHS_SUFFIX}'"
    if len(lengths_B) != batch:
        raise RequestError(f"{where}: expected {batch} values, found {len(lengths_B)}")
    if batch and not 0 <= int(lengths_B.min()) <= int(lengths_B.max()) <= feature.ids_max:
        raise RequestError(
            f"{where}: lengths must be in 0..{feature.ids_max}, "
            f"found {int(lengths_B.min())}..{int(lengths_B.max())}"
        )
    if int(lengths_B.sum()) != len(ids_L):
        raise RequestError(
            f"{where}: lengths sum to {int(lengths_B.sum())}, input '{feature.name}' has {len(ids_L)} ids"
        )
    keys_L, _ = make_keys(ids_L, class_id=feature.class_id)
    return FeatureKeys(feature=feature, keys_L=keys_L, lengths_B=lengths_B)


def _buckets(values: Array, feature: SignatureFeature) -> npt.NDArray[np.int64]:
    """Bucket = number of edges <= value; NaN has the bucket after the last."""
    values_B = _typed(values, np.float32, name=feature.name)
    edges = np.asarray(feature.bucket_edges, dtype=np.float64)
    buckets_B = np.searchsorted(edges, values_B.astype(np.float64), side="right").astype(np.int64)
    buckets_B[np.isnan(values_B)] = len(edges) + 1
    return buckets_B


def domain_indices(values: Array, domains: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """The values of input "domain", names or indices, as indices. Raises: RequestError for any other."""
    if values.dtype == np.int64:
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < len(domains):
            raise RequestError(f"input '{DOMAIN_FEATURE}': indices must be in 0..{len(domains) - 1}")
        return values
    if values.dtype != np.object_:
        raise RequestError(f"input '{DOMAIN_FEATURE}': expected BYTES or INT64, found {values.dtype.name}")
    indices = {name.encode(): index for index, name in enumerate(domains)}
    unknown = next((value for value in values if value not in indices), None)
    if unknown is not None:
        text = bytes(unknown[:60]).decode(errors="replace")
        raise RequestError(f"input '{DOMAIN_FEATURE}': unknown domain '{text}'; there are {list(domains)}")
    return np.fromiter((indices[value] for value in values), dtype=np.int64, count=len(values))


def _typed(values: Array, dtype: type[Any], *, name: str) -> Array:
    if values.dtype != dtype:
        raise RequestError(
            f"input '{name}': expected {np.dtype(dtype).name} values, found {values.dtype.name}"
        )
    return values
