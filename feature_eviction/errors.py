"""What can go wrong in the id table.

FeatureEvictionError
├── TableFullError    a slot map was asked to hold more keys than it has slots
├── StateError        a saved state is damaged, or belongs to another policy
├── ScoreError        a score function cannot be used; found when the table is made
└── InFlightError     too many batches were mapped and never released
"""

from __future__ import annotations


class FeatureEvictionError(Exception):
    """Says what was expected, what was found, where, and what to do."""


class TableFullError(FeatureEvictionError):
    pass


class StateError(FeatureEvictionError):
    pass


class ScoreError(FeatureEvictionError):
    pass


class InFlightError(FeatureEvictionError):
    pass
