"""Schema, configuration and presets of a run."""

from trainer.config.config import Config, load_config, to_toml
from trainer.config.presets import preset
from trainer.config.schema import FeatureConfig, SchemaConfig

__all__ = ["Config", "FeatureConfig", "SchemaConfig", "load_config", "preset", "to_toml"]
