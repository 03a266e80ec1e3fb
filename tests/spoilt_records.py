"""Records as a faulty producer would send them: the project's own encoder refuses to make them."""

from __future__ import annotations

from proto.impression_pb2 import ImpressionBatch


def with_label(record: bytes, *, row: int, value: int) -> bytes:
    """The first task's label of one row is this number, from 0 to 255."""
    batch = ImpressionBatch.FromString(record)
    label = batch.labels[0]
    label.values = label.values[:row] + bytes([value]) + label.values[row + 1 :]
    return batch.SerializeToString()
