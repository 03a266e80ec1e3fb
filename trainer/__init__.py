"""Continuous training: stream, model, sharded tables, checkpoints, versions, and whole runs."""
