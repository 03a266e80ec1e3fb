"""Keys of the id table: feature class and raw id in one int64, and what is computed from them alone.

Legend: N ids as they come, U distinct keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_eviction.jit import kernel
from feature_eviction.policy import CLASS_ID_MAX

ID_BITS = 52
ID_LIMIT = 1 << ID_BITS

_ID_SHIFT = np.uint64(ID_BITS)
_FOLD_SHIFT = np.uint64(64 - ID_BITS)
_OWNER_SALT = np.uint64(0x8E9D5A7C3B1F2D49)

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class UniqueKeys(NamedTuple):
    """The distinct keys of a batch, in order of first appearance."""

    keys_U: Int64Array
    shows_U: Int32Array
    """How often each key appeared."""
    positives_U: Int32Array
    """How many positives it appeared with."""
    inverse_N: Int32Array
    """Where each key of the batch stands in keys_U."""


@kernel
def mix64(value: Any) -> Any:
    """A bijection of 64 bits in which each input bit moves about half of the output bits.

    Source: David Stafford's "Mix13" finaliser, as used by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    mixed = np.uint64(value)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@kernel
def class_of_key(key: Any) -> Any:
    """The upper 12 bits of one key."""
    return np.int64(np.uint64(key) >> _ID_SHIFT)


@kernel
def _make_keys(ids_N: Any, class_bits: Any, keys_N: Any) -> Any:
    num_folded = 0
    for i in range(len(ids_N)):
        raw_id = ids_N[i]
        if raw_id < 0 or raw_id >= ID_LIMIT:
            raw_id = np.int64(mix64(raw_id) >> _FOLD_SHIFT)
            num_folded += 1
        keys_N[i] = class_bits | raw_id
    return num_folded


@kernel
def _owner_of(keys_N: Any, num_owners: Any, owners_N: Any) -> None:
    for i in range(len(keys_N)):
        owners_N[i] = mix64(np.uint64(keys_N[i]) ^ _OWNER_SALT) % num_owners


@kernel
def _deduplicate(keys_N: Any, positives_N: Any, found_H: Any, unique: Any) -> Any:
    """Fill `unique`; found_H is a scratch table of a power of two cells, all -1."""
    mask = np.uint64(len(found_H) - 1)
    num_unique = 0
    for i in range(len(keys_N)):
        key = keys_N[i]
        cell = mix64(key) & mask
        while found_H[cell] >= 0 and unique.keys_U[found_H[cell]] != key:
            cell = (cell + np.uint64(1)) & mask
        index = found_H[cell]
        if index < 0:
            index = np.int32(num_unique)
            found_H[cell] = index
            unique.keys_U[index] = key
            unique.shows_U[index] = 0
            unique.positives_U[index] = 0
            num_unique += 1
        unique.shows_U[index] += 1
        unique.positives_U[index] += positives_N[i]
        unique.inverse_N[i] = index
    return num_unique


def as_keys(keys_N: npt.ArrayLike, *, name: str = "keys_N") -> Int64Array:
    """A contiguous int64 [N] view or copy.

    Raises: ValueError if it is not one-dimensional or not of integers (an empty list is fine).
    """
    array = np.asarray(keys_N)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise ValueError(f"{name} must be int64 [N], found {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=np.int64)


def make_keys(ids_N: npt.ArrayLike, *, class_id: int) -> tuple[Int64Array, int]:
    """key = class << 52 | id; classes from 2048 on give negative keys, which are as good as any.

    An id outside [0, 2^52) is folded to mix64(id) >> 12: the upper 52 bits of its mix. Folded ids can
    meet others of their class on one row, so they are counted.

    Args: ids_N: int64 [N]; class_id: 0..4095.
    Returns: keys int64 [N] and the number of folded ids.
    Raises: ValueError for another shape, dtype or class_id.
    """
    if not 0 <= class_id <= CLASS_ID_MAX:
        raise ValueError(f"class_id must be in 0..{CLASS_ID_MAX}, found {class_id}")
    ids_N = as_keys(ids_N, name="ids_N")
    keys_N = np.empty(len(ids_N), np.int64)
    class_bits = np.uint64(class_id << ID_BITS).astype(np.int64)
    return keys_N, int(_make_keys(ids_N, class_bits, keys_N))


def class_of(keys_N: npt.ArrayLike) -> Int32Array:
    """The feature class of each key: int32 [N] in 0..4095."""
    return (as_keys(keys_N).view(np.uint64) >> _ID_SHIFT).astype(np.int32)


def owner_of(keys_N: npt.ArrayLike, *, num_owners: int) -> Int32Array:
    """The rank or shard that owns each key: int32 [N] in [0, num_owners).

    Its mix has a salt of its own: with the slot map's hash every owner would fill only a part of its cells.
    """
    if not 1 <= num_owners < 2**31:
        raise ValueError(f"num_owners must be in 1..2^31-1, found {num_owners}")
    keys_N = as_keys(keys_N)
    owners_N = np.empty(len(keys_N), np.int32)
    _owner_of(keys_N, np.uint64(num_owners), owners_N)
    return owners_N


def deduplicate(keys_N: npt.ArrayLike, positives_N: npt.ArrayLike) -> UniqueKeys:
    """Distinct keys in order of first appearance, with their numbers of shows and positives.

    Args: keys_N: int64 [N], any values; positives_N: integers or bools [N].
    Raises: ValueError where the two differ in length, or for other dtypes.
    """
    keys_N = as_keys(keys_N)
    positives_N = np.ascontiguousarray(positives_N, dtype=np.int32)
    num_keys = len(keys_N)
    if positives_N.shape != (num_keys,):
        raise ValueError(f"positives_N must be [{num_keys}] as keys_N is, found {list(positives_N.shape)}")
    found_H = np.full(1 << max(3, (2 * num_keys - 1).bit_length()), -1, np.int32)
    unique = UniqueKeys(
        keys_U=np.empty(num_keys, np.int64),
        shows_U=np.empty(num_keys, np.int32),
        positives_U=np.empty(num_keys, np.int32),
        inverse_N=np.empty(num_keys, np.int32),
    )
    num_unique = int(_deduplicate(keys_N, positives_N, found_H, unique))
    return UniqueKeys(
        unique.keys_U[:num_unique],
        unique.shows_U[:num_unique],
        unique.positives_U[:num_unique],
        unique.inverse_N,
    )
