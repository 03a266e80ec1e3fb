"""Where each feature's embedding lies in the concatenated embedding E.

The order is the one in which the sharded tables return features: tables by ascending dim, features
of a table in schema order. Serving concatenates in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.schema import FeatureConfig, FeatureRole, SchemaConfig


@dataclass(frozen=True, slots=True)
class FeatureLayout:
    """Features in the order of E, with the columns of each: E[:, starts[i] : starts[i] + dims[i]]."""

    features: tuple[FeatureConfig, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, schema: SchemaConfig) -> FeatureLayout:
        features = tuple(sorted(schema.features, key=lambda feature: feature.dim))
        starts, width = [], 0
        for feature in features:
            starts.append(width)
            width += feature.dim
        return cls(features=features, starts=tuple(starts))

    @property
    def width(self) -> int:
        """e, the width of E."""
        return self.starts[-1] + self.features[-1].dim

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(feature.dim for feature in self.features)

    def columns_of(self, *roles: FeatureRole) -> list[int]:
        """The columns of E that belong to features of these roles, ascending."""
        return [
            column
            for feature, start in zip(self.features, self.starts, strict=True)
            if feature.role in roles
            for column in range(start, start + feature.dim)
        ]
