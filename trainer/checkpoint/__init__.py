"""The whole state of a run, saved and restored: tables, dense model, optimizers, metrics, positions.

Rows are RowSegments by raw key, never by slot, so any number of ranks can load them; with the number of
ranks and slots unchanged the id tables come back slot for slot and the run goes on bit for bit.
"""

from trainer.checkpoint.capture import StatePart
from trainer.checkpoint.progress import Committed, Progress, Restored
from trainer.checkpoint.saver import Checkpoints, SavePhase

__all__ = ["Checkpoints", "Committed", "Progress", "Restored", "SavePhase", "StatePart"]
