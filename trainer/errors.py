"""What can go wrong in the trainer.

FreshetError
├── ConfigError        a configuration or an argument is wrong: the user mends it
├── DataError          an input file is missing or lacks what it must have
├── StreamError        the broker, a topic or a position is not usable
├── CheckpointError    a checkpoint is damaged, or belongs to another configuration
└── ChildError         a process of `trainer run` died
"""

from __future__ import annotations


class FreshetError(Exception):
    """Shown to the operator as one line; says where, what was found and what to do."""


class ConfigError(FreshetError):
    pass


class DataError(FreshetError):
    pass


class StreamError(FreshetError):
    pass


class CheckpointError(FreshetError):
    pass


class ChildError(FreshetError):
    pass
