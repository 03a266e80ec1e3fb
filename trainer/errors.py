"""What can go wrong in the trainer.

FreshetError
├── ConfigError        a configuration or an argument is wrong: the user mends it
├── DataError          an input file is missing or lacks what it must have
├── StreamError        the broker, a topic or a position is not usable
├── NotFiniteError     losses or gradients are not finite, and nothing of their batches was applied
├── CheckpointError    a checkpoint cannot be saved, or belongs to another configuration
│   ├── DamagedError     a file of it is missing, torn or changed
│   ├── StoreError       the directory or the object store does not do what it is asked
│   └── LeaseLostError   another run has taken the checkpoint directory over
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


class NotFiniteError(FreshetError):
    pass


class CheckpointError(FreshetError):
    pass


class DamagedError(CheckpointError):
    pass


class StoreError(CheckpointError):
    pass


class LeaseLostError(CheckpointError):
    pass


class ChildError(FreshetError):
    pass
