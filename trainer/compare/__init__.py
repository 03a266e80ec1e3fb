"""The models on one stream, by one protocol: `python -m trainer compare` (docs/compare.md)."""
