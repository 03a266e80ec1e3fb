"""The scored id table: which raw ids have a row, which row it is, and which rows must leave.

IdTable gives the trainer's ids their slots inside a hard budget; SlotMap is the bare index for whoever
needs no score. Numba kernels over numpy arrays; every array is allocated once, at its final size.
"""

from feature_eviction.answers import (
    OTHER_CLASSES,
    ClassCounters,
    MapResult,
    TableCounters,
    TableRows,
    Why,
)
from feature_eviction.count_sketch import CountSketch
from feature_eviction.errors import (
    FeatureEvictionError,
    InFlightError,
    ScoreError,
    StateError,
    TableFullError,
)
from feature_eviction.id_table import IdTable
from feature_eviction.id_table_state import State
from feature_eviction.keys import UniqueKeys, class_of, deduplicate, make_keys, owner_of
from feature_eviction.layout import num_slots_for_budget, table_bytes
from feature_eviction.policy import AdmissionConfig, ClassPolicy, ScoreConfig, TablePolicy
from feature_eviction.slot_map import SlotMap
from feature_eviction.user_score import Score, score

__all__ = [
    "OTHER_CLASSES",
    "AdmissionConfig",
    "ClassCounters",
    "ClassPolicy",
    "CountSketch",
    "FeatureEvictionError",
    "IdTable",
    "InFlightError",
    "MapResult",
    "Score",
    "ScoreConfig",
    "ScoreError",
    "SlotMap",
    "State",
    "StateError",
    "TableCounters",
    "TableFullError",
    "TablePolicy",
    "TableRows",
    "UniqueKeys",
    "Why",
    "class_of",
    "deduplicate",
    "make_keys",
    "num_slots_for_budget",
    "owner_of",
    "score",
    "table_bytes",
]
