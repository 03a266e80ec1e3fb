"""PEPNet and its parts; pure modules that know nothing of tables, streams or ranks."""

from trainer.model.epnet import EPNet
from trainer.model.gate_nu import GateInput
from trainer.model.layout import FeatureLayout
from trainer.model.pepnet import PEPNet, multi_task_loss
from trainer.model.ppnet import PPNet

__all__ = ["EPNet", "FeatureLayout", "GateInput", "PEPNet", "PPNet", "multi_task_loss"]
