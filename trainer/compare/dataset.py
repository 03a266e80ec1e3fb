"""The data of one seed: drawn once, filtered, split, and kept on disk as columns that every run reads.

Shapes: N impressions, T tasks, M chosen impressions, L = ids of one jagged column.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trainer.compare.protocol import SLICE_NAMES, check_labels, kept, slices
from trainer.compare.settings import Settings, as_file_name, base_config, data_key
from trainer.config import Config
from trainer.config.config import IMPRESSIONS_PER_RECORD_MAX
from trainer.config.schema import SchemaConfig
from trainer.errors import DataError
from trainer.features import bucketise
from trainer.stream.columns import Impressions, Jagged
from trainer.stream.slicing import concat_impressions, select_impressions

Rows = npt.NDArray[np.int64]
Columns = dict[str, npt.NDArray[Any]]

FORMAT = 1
ITEM_FEATURE = "item_id"


class DataFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the columns without reading them; the JSON beside them."""

    format: int
    key: str
    digest: str
    """sha256 of the file."""
    source: str
    domains: tuple[str, ...]
    """Those that have impressions, in the schema's order."""
    drawn: int
    kept: int
    users: int
    items: int
    by_slice: dict[str, int]
    num_keys: dict[int, int]
    """Distinct ids by class_id."""
    has_truth: bool


@dataclass(frozen=True, slots=True)
class Dataset:
    """The columns in memory, in the order of events."""

    facts: DataFacts
    impressions: Impressions
    slice_N: npt.NDArray[np.uint8]
    truth_NT: npt.NDArray[np.float32] | None
    """The true probabilities, where the stream is synthetic."""
    starts: dict[str, Rows]
    """Of each jagged feature with several ids: int64 [N + 1], where an impression's ids begin in ids_L."""

    def rows(self, name: str, *, domain: int | None = None) -> Rows:
        """The impressions of a slice (of one domain), in the order of events."""
        in_slice_N = self.slice_N == SLICE_NAMES[name]
        if domain is not None:
            in_slice_N &= self.impressions.domain_N == domain
        return np.flatnonzero(in_slice_N)

    def take(self, rows_M: Rows, *, task: int | None = None) -> Impressions:
        """Impressions in any order, with all tasks' labels or those of one."""
        all_ = self.impressions
        tasks = slice(None) if task is None else slice(task, task + 1)
        sparse = {}
        for name, jagged in all_.sparse.items():
            starts_N = self.starts.get(name)
            lengths_M = jagged.lengths_N[rows_M]
            place_L = rows_M if starts_N is None else _places(starts_N[rows_M], lengths_M)
            sparse[name] = Jagged(jagged.ids_L[place_L], lengths_M)
        return Impressions(
            request_ids_N=all_.request_ids_N[rows_M],
            user_ids_N=all_.user_ids_N[rows_M],
            event_time_ms_N=all_.event_time_ms_N[rows_M],
            produced_ms_N=all_.produced_ms_N[rows_M],
            domain_N=all_.domain_N[rows_M],
            sparse=sparse,
            dense={name: values_N[rows_M] for name, values_N in all_.dense.items()},
            labels_NT=all_.labels_NT[rows_M, tasks],
            known_NT=all_.known_NT[rows_M, tasks],
        )


def _places(starts_M: Rows, lengths_M: npt.NDArray[np.int32]) -> Rows:
    """Where the ids of these impressions lie, one impression after the other."""
    first_M = np.cumsum(lengths_M, dtype=np.int64) - lengths_M
    places_L: Rows = np.arange(int(lengths_M.sum())) + np.repeat(starts_M - first_M, lengths_M)
    return places_L


def prepare(settings: Settings, *, seed: int, folder: Path) -> tuple[Path, DataFacts]:
    """The seed's columns on disk; drawn unless they are there, whole, and of these settings.

    Returns: the file, and what it holds.
    Raises: DataError for labels that are neither 0 nor 1, missing columns and slices without impressions.
    """
    config = base_config(settings, seed=seed)
    key = data_key(settings, config)
    name = "recording" if settings.data else f"{as_file_name(settings.preset)}-seed{seed}"
    path = folder / f"{name}-{key}.safetensors"
    facts = _facts_of(path, key=key)
    if facts is not None:
        return path, facts
    folder.mkdir(parents=True, exist_ok=True)
    columns, facts = _columns(settings, config, key=key)
    half_written = path.with_suffix(f".{os.getpid()}.part")
    save_file(columns, half_written)
    facts = replace(facts, digest=_digest(half_written))
    os.replace(half_written, path)
    _facts_path(path).write_bytes(msgspec.json.format(msgspec.json.encode(facts)))
    return path, facts


def _facts_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _facts_of(path: Path, *, key: str) -> DataFacts | None:
    """None if the columns have to be drawn (again)."""
    try:
        facts = msgspec.json.decode(_facts_path(path).read_bytes(), type=DataFacts)
        whole = facts.format == FORMAT and facts.key == key and _digest(path) == facts.digest
    except (FileNotFoundError, msgspec.MsgspecError):
        # Half written, or by another release: the file is made anew, as if it were not there.
        return None
    return facts if whole else None


def _columns(settings: Settings, config: Config, *, key: str) -> tuple[Columns, DataFacts]:
    source = settings.data or f"preset '{config.preset}', seed {config.seed}"
    impressions, truth_NT = _drawn(settings, config, source=source)
    schema = config.schema
    check_labels(impressions.labels_NT, impressions.known_NT, tasks=schema.task_names, where=source)
    drawn = len(impressions)
    chosen_N = np.ones(drawn, np.bool_)
    if settings.protocol.interactions_min > 1:
        items_N = _items(impressions, source=source)
        chosen_N = kept(impressions.user_ids_N, items_N, least=settings.protocol.interactions_min)
    if not chosen_N.any():
        raise DataError(
            f"{source}: no user and item of {drawn} impressions has {settings.protocol.interactions_min} "
            "interactions; take more impressions, or a lower --min-interactions"
        )
    impressions = select_impressions(impressions, chosen_N)
    domains, impressions = _only_domains_with_impressions(impressions, schema.domains)
    slice_N = slices(impressions.event_time_ms_N, settings.protocol, where=source)
    columns: Columns = {
        "request_ids": impressions.request_ids_N,
        "user_ids": impressions.user_ids_N,
        "event_time_ms": impressions.event_time_ms_N,
        "domain": impressions.domain_N,
        "slice": slice_N,
        "labels": impressions.labels_NT,
        "known": impressions.known_NT,
    }
    for name, jagged in impressions.sparse.items():
        columns[f"ids.{name}"] = jagged.ids_L
        if len(jagged.ids_L) != len(impressions) or (jagged.lengths_N != 1).any():
            columns[f"lengths.{name}"] = jagged.lengths_N
    columns |= {f"dense.{name}": values_N for name, values_N in impressions.dense.items()}
    if truth_NT is not None:
        columns["truth"] = truth_NT[chosen_N]
    facts = DataFacts(
        format=FORMAT,
        key=key,
        digest="",
        source=source,
        domains=domains,
        drawn=drawn,
        kept=len(impressions),
        users=len(np.unique(impressions.user_ids_N)),
        items=len(np.unique(impressions.sparse[ITEM_FEATURE].ids_L))
        if ITEM_FEATURE in impressions.sparse
        else 0,
        by_slice={name: int((slice_N == value).sum()) for name, value in SLICE_NAMES.items()},
        num_keys=_num_keys(impressions, schema),
        has_truth=truth_NT is not None,
    )
    return {name: np.ascontiguousarray(values) for name, values in columns.items()}, facts


def _drawn(
    settings: Settings, config: Config, *, source: str
) -> tuple[Impressions, npt.NDArray[np.float32] | None]:
    """The whole stream, with the truth where it is known."""
    parts, truths = [], []
    for batch in _batches(settings, config):
        if isinstance(batch, tuple):
            parts.append(batch[0])
            truths.append(batch[1])
        else:
            parts.append(batch)
    if not parts:
        raise DataError(f"{source}: holds no impression")
    return concat_impressions(parts), np.concatenate(truths) if truths else None


def _batches(settings: Settings, config: Config) -> Iterator[Any]:
    from trainer.data import impression_source

    large = replace(config.produce, record_impressions=IMPRESSIONS_PER_RECORD_MAX)
    path = Path(settings.data) if settings.data else None
    return impression_source(replace(config, produce=large), data=path)


def _items(impressions: Impressions, *, source: str) -> Rows:
    if ITEM_FEATURE not in impressions.sparse:
        raise DataError(
            f"{source}: the schema has no feature '{ITEM_FEATURE}', by which items with few interactions are "
            "left out; add it, or give --min-interactions 1"
        )
    return impressions.sparse[ITEM_FEATURE].ids_L


def _only_domains_with_impressions(
    impressions: Impressions, domains: tuple[str, ...]
) -> tuple[tuple[str, ...], Impressions]:
    """A recording need not have every domain of its schema; models get towers for those alone."""
    present = np.unique(impressions.domain_N)
    if len(present) == len(domains):
        return domains, impressions
    index_D = np.zeros(len(domains), np.uint8)
    index_D[present] = np.arange(len(present))
    columns = {name: getattr(impressions, name) for name in Impressions.__dataclass_fields__}
    columns["domain_N"] = index_D[impressions.domain_N]
    return tuple(domains[index] for index in present), Impressions(**columns)


def _num_keys(impressions: Impressions, schema: SchemaConfig) -> dict[int, int]:
    """Distinct ids by class; of features that share a class at most the sum."""
    num: dict[int, int] = {}
    for feature in schema.features:
        if feature.kind == "dense":
            ids = bucketise(impressions.dense[feature.name], edges=feature.bucket_edges)
        elif feature.name == "user_id":
            ids = impressions.user_ids_N
        elif feature.name == "domain":
            ids = impressions.domain_N.astype(np.int64)
        else:
            ids = impressions.sparse[feature.name].ids_L
        num[feature.class_id] = num.get(feature.class_id, 0) + len(np.unique(ids))
    return num


def load(path: Path) -> Dataset:
    """Raises: DataError if the file is missing or torn."""
    try:
        columns = load_file(path)
        facts = msgspec.json.decode(_facts_path(path).read_bytes(), type=DataFacts)
    except (OSError, SafetensorError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{path}: the columns cannot be read ({error}); remove it, and they are drawn anew"
        ) from error
    num = len(columns["user_ids"])
    sparse, starts = {}, {}
    for column, ids_L in columns.items():
        kind, _, name = column.partition(".")
        if kind != "ids":
            continue
        lengths_N = columns.get(f"lengths.{name}")
        if lengths_N is not None:
            starts[name] = np.concatenate([[0], np.cumsum(lengths_N, dtype=np.int64)])
        sparse[name] = Jagged(ids_L, np.ones(num, np.int32) if lengths_N is None else lengths_N)
    impressions = Impressions(
        request_ids_N=columns["request_ids"],
        user_ids_N=columns["user_ids"],
        event_time_ms_N=columns["event_time_ms"],
        produced_ms_N=np.zeros(num, np.int64),
        domain_N=columns["domain"],
        sparse=sparse,
        dense={
            name[len("dense.") :]: values for name, values in columns.items() if name.startswith("dense.")
        },
        labels_NT=columns["labels"],
        known_NT=columns["known"],
    )
    return Dataset(facts, impressions, columns["slice"], columns.get("truth"), starts)
