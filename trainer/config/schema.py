"""What an impression consists of: features, domains and tasks.

The schema is the contract between the producers, the stream decoder, the model and serving; its
hash travels with every version, so that a replica never reads rows under another meaning.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import msgspec

from feature_eviction.policy import CLASS_ID_MAX, AdmissionConfig

FeatureKind = Literal["single", "multi", "dense"]
FeatureRole = Literal["user", "item", "author", "domain", "other"]

USER_ID_SOURCE = "user_id"
"""The feature that reads the record's own user id column."""
DOMAIN_SOURCE = "domain"
"""The feature that reads the record's own domain column (its index in `domains`)."""
BUILT_IN = (USER_ID_SOURCE, DOMAIN_SOURCE)
"""They have no column beside these."""

_OF_THE_CLASS = ("dim", "ttl_s", "min_updates", "max_rows", "protected", "admission")
"""What features that share rows must agree on."""
_OF_THE_MEANING = ("name", "class_id", "dim", "kind", "bucket_edges", "role")
"""What makes a feature's rows readable; the role decides where the model feeds them in."""


class FeatureConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input of the model; each becomes one embedding of `dim` values an impression."""

    name: str
    """The record's column; `user_id` and `domain` read the record's own users and domains."""
    class_id: int
    """0..4095; features with the same one share their rows."""
    dim: int
    """Values of a row, a multiple of 4; all features of one dim share a table."""
    kind: FeatureKind = "single"
    """single: exactly one id; multi: 0..n ids, averaged; dense: a number, bucketised by `bucket_edges` and
    embedded."""
    role: FeatureRole = "other"
    """Whose prior it is part of: domain, EPNet's; user, item and author, PPNet's; other, nobody's."""
    bucket_edges: tuple[float, ...] = ()
    """Ascending; value v falls into bucket = number of edges <= v; NaN into one bucket more."""
    ids_max: int = 64
    """The longest id list a `multi` feature may bring; a longer one makes the impression bad."""
    admission: AdmissionConfig = AdmissionConfig()
    ttl_s: int | None = None
    """A row unseen for longer than this leaves; unset = never."""
    min_updates: int = 0
    """A row that has gathered fewer shows when ttl_s has passed since its admission leaves as well."""
    max_rows: int | None = None
    """The most rows the class may hold on each rank; unset = as many as the table."""
    protected: bool = False
    """Its rows are never evicted for their score or for max_rows; they can still expire."""

    def __post_init__(self) -> None:
        where = f"feature '{self.name}'"
        if not 0 <= self.class_id <= CLASS_ID_MAX:
            raise ValueError(f"{where}: class_id must be in 0..{CLASS_ID_MAX}, found {self.class_id}")
        if self.dim < 4 or self.dim % 4:
            raise ValueError(f"{where}: dim must be a positive multiple of 4, found {self.dim}")
        if (self.kind == "dense") != bool(self.bucket_edges):
            raise ValueError(f"{where}: bucket_edges belong to kind 'dense' and only there")
        if list(self.bucket_edges) != sorted(set(self.bucket_edges)):
            raise ValueError(f"{where}: bucket_edges must ascend, found {list(self.bucket_edges)}")
        if not 1 <= self.ids_max <= 65535:
            raise ValueError(f"{where}: ids_max must be in 1..65535, found {self.ids_max}")
        if self.ttl_s is not None and not 1 <= self.ttl_s < 2**31:
            raise ValueError(f"{where}: ttl_s must be in 1..2^31-1 seconds, found {self.ttl_s}")
        if not 0 <= self.min_updates < 2**31:
            raise ValueError(f"{where}: min_updates must be in 0..2^31-1, found {self.min_updates}")
        if self.min_updates and self.ttl_s is None:
            raise ValueError(f"{where}: min_updates are to be gathered within ttl_s, which is missing")
        if self.max_rows is not None and not 1 <= self.max_rows < 2**31:
            raise ValueError(f"{where}: max_rows must be in 1..2^31-1, found {self.max_rows}")

    @property
    def table(self) -> str:
        """The name of the table that holds this feature's rows: one table a dim."""
        return table_name(self.dim)


class TaskConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One binary label to predict."""

    name: str
    """The record's label column."""
    loss_weight: float = 1.0
    """What the task's loss is multiplied by."""
    base_rate: float = 0.5
    """About the share of positives, where a new model's answers begin; the right size is enough."""
    label: Literal["recorded", "click", "effective_view"] = "recorded"
    """Of a recording: the task's own column; or made of watch time: a click, for which in `single_column`
    domains more than 3 s of watching count, or an effective view (trainer/data/kuairand_labels.py)."""
    single_column: tuple[str, ...] = ()
    """Domains that play videos one by one, without a click; for label "click"."""
    effective_view_line: Literal["median", "half_of_duration"] = "median"
    """Watched for longer than the median impression, or for at least half of the video."""

    def __post_init__(self) -> None:
        if not 0 <= self.loss_weight < math.inf:
            raise ValueError(
                f"task '{self.name}': loss_weight must not be negative, found {self.loss_weight}"
            )
        if not 0 < self.base_rate < 1:
            raise ValueError(f"task '{self.name}': base_rate must be in (0, 1), found {self.base_rate}")
        if (self.label == "click") != bool(self.single_column):
            raise ValueError(
                f"task '{self.name}': single_column belongs to label 'click' and only there, found label "
                f"'{self.label}' and {len(self.single_column)} domains"
            )
        if self.label != "effective_view" and self.effective_view_line != "median":
            raise ValueError(
                f"task '{self.name}': effective_view_line is an option of label 'effective_view', "
                f"found label '{self.label}'"
            )

    @property
    def meaning(self) -> str | list[str]:
        """What tells its labels apart from another task's; the name where they are as recorded."""
        if self.label == "recorded":
            return self.name
        return [self.name, self.label, self.effective_view_line, *self.single_column]


class SchemaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Features, domains and tasks, in the order in which the model sees them."""

    features: tuple[FeatureConfig, ...]
    domains: tuple[str, ...]
    """Where impressions happen, by the names that records use; at most 255."""
    tasks: tuple[TaskConfig, ...]
    positive_task: str
    """The label that makes a sample positive in the id table's score."""

    def __post_init__(self) -> None:
        for what, names in (
            ("feature", [feature.name for feature in self.features]),
            ("domain", list(self.domains)),
            ("task", [task.name for task in self.tasks]),
        ):
            if not names:
                raise ValueError(f"schema: at least one {what} is needed")
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise ValueError(f"schema: {what} names must be unique, found twice: {', '.join(doubled)}")
        if len(self.domains) > 255:
            raise ValueError(f"schema: at most 255 domains, found {len(self.domains)}")
        if self.positive_task not in self.task_names:
            raise ValueError(f"schema: positive_task '{self.positive_task}' is not one of {self.task_names}")
        for task in self.tasks:
            unknown = [name for name in task.single_column if name not in self.domains]
            if unknown:
                raise ValueError(
                    f"schema: task '{task.name}': single_column names {', '.join(unknown)}; the domains are "
                    f"{', '.join(self.domains)}"
                )
        for name in BUILT_IN:
            feature = next((f for f in self.features if f.name == name), None)
            if feature is not None and feature.kind != "single":
                raise ValueError(f"schema: feature '{name}' reads a built-in column and must be 'single'")
        self._check_shared_classes()

    def _check_shared_classes(self) -> None:
        owner: dict[int, FeatureConfig] = {}
        for feature in self.features:
            first = owner.setdefault(feature.class_id, feature)
            differ = [name for name in _OF_THE_CLASS if getattr(feature, name) != getattr(first, name)]
            if differ:
                raise ValueError(
                    f"schema: features '{first.name}' and '{feature.name}' share class_id {first.class_id}; "
                    f"their {', '.join(differ)} must be equal"
                )

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def dims(self) -> list[int]:
        """The distinct embedding dims, ascending: one table each."""
        return sorted({feature.dim for feature in self.features})

    def hash(self) -> str:
        """A short digest of everything that gives ids, rows and outputs their meaning, and of nothing else.

        Admission, lifetimes, quotas, limits and loss weights may change under trained rows: checkpoints
        and versions made before still belong to this schema.
        """
        meaning = (
            [{name: getattr(feature, name) for name in _OF_THE_MEANING} for feature in self.features],
            self.domains,
            [task.meaning for task in self.tasks],
        )
        return hashlib.sha256(msgspec.json.encode(meaning, order="deterministic")).hexdigest()[:16]


def table_name(dim: int) -> str:
    return f"dim{dim}"
