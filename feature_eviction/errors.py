"""What can go wrong in the id table.

FeatureEvictionError
├── TableFullError    a slot map was asked to hold more keys than it has slots
└── StateError        a saved state is damaged, or belongs to another policy
"""

from __future__ import annotations


class FeatureEvictionError(Exception):
    """Says what was expected, what was found, where, and what to do."""


class TableFullError(FeatureEvictionError):
    pass


class StateError(FeatureEvictionError):
    pass
