"""Where each feature's embedding lies in the concatenated embedding E.

The order is the one in which the sharded tables return features: tables by ascending dim, features
of a table in schema order. Serving concatenates in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.schema import FeatureConfig, FeatureRole, SchemaConfig
from trainer.errors import ConfigError


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

    def runs_of(self, *roles: FeatureRole) -> tuple[tuple[int, int], ...]:
        """The same columns as (start, width) of each unbroken run."""
        runs: list[tuple[int, int]] = []
        for feature, start in zip(self.features, self.starts, strict=True):
            if feature.role not in roles:
                continue
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + feature.dim)
            else:
                runs.append((start, feature.dim))
        return tuple(runs)


def common_dim(layout: FeatureLayout, *, needed_by: str) -> int:
    """The dim that all features have.

    Raises: ConfigError naming who needs it if they differ.
    """
    dims = sorted(set(layout.dims))
    if len(dims) > 1:
        raise ConfigError(
            f"model {needed_by} multiplies features' embeddings with each other: they need one dim, "
            f"found {', '.join(map(str, dims))}. Give all features the same dim, or choose another model."
        )
    return dims[0]


def fields_of(embedding_BE: Tensor, *, dim: int) -> Tensor:
    """E cut into its features' embeddings, float [B, F, dim]; all features have that dim."""
    return embedding_BE.reshape(-1, embedding_BE.shape[1] // dim, dim)


def columns_in(embedding_BE: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """The columns of these runs: a view where there is one run, which a gather by index never is."""
    parts = [embedding_BE.narrow(1, start, width) for start, width in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
