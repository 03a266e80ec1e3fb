"""The dense models and their parts; pure modules that know nothing of tables, streams or ranks."""

from trainer.model.epnet import EPNet
from trainer.model.gate_nu import GateInput
from trainer.model.layout import FeatureLayout
from trainer.model.pepnet import PEPNet, multi_task_loss
from trainer.model.ppnet import PPNet
from trainer.model.registry import (
    MODELS,
    ModelKind,
    build_model,
    check_can_be_served,
    kind_of,
    model_of,
    uses_domain,
)

__all__ = [
    "MODELS",
    "EPNet",
    "FeatureLayout",
    "GateInput",
    "ModelKind",
    "PEPNet",
    "PPNet",
    "build_model",
    "check_can_be_served",
    "kind_of",
    "model_of",
    "multi_task_loss",
    "uses_domain",
]
