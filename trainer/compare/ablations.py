"""PEPNet with one thing changed at a time (PEPNet, arXiv 2302.01115, section 4.4)."""

from __future__ import annotations

from typing import Any

from trainer.compare.plan import Variant
from trainer.compare.summary import PEPNET
from trainer.config import Config

WHOLE = Variant(name=PEPNET, model=PEPNET)


def _changed(name: str, **changes: Any) -> Variant:
    return Variant(name=name, model=PEPNET, model_changes=changes)


ABLATIONS = (
    Variant(name="-EPNet", model="ppnet"),
    Variant(name="-PPNet", model="epnet"),
    _changed("gate input trained", gate_input_gradient=True),
    _changed("-gate input", epnet_input="domain", ppnet_input="prior"),
)
"""Each takes something of the equations away and must lose."""

SWEEPS = (
    *(_changed(f"gamma {gamma:g}", gate_gamma=gamma) for gamma in (1.0, 2.0, 3.0)),
    *(Variant(name=f"dim {dim}", model=PEPNET, dim=dim) for dim in (8, 16, 40, 64)),
    _changed("towers 64", tower_widths=(64,)),
    _changed("towers 100-64", tower_widths=(100, 64)),
    _changed("towers 128-100-64", tower_widths=(128, 100, 64)),
    _changed("first layer hidden", first_layer="hidden"),
    _changed("EPNet by field", epnet_gate="field"),
    Variant(name="Adam throughout", model=PEPNET, optimizer_changes={"embedding": "adam"}),
)
"""Other sizes and options, which may go either way."""


def variants(config: Config) -> tuple[Variant, ...]:
    """The whole model of this configuration, and all that differs from it."""
    return (WHOLE, *(one for one in (*ABLATIONS, *SWEEPS) if _differs(one, config)))


def _differs(variant: Variant, config: Config) -> bool:
    if variant.model != PEPNET or (variant.dim is not None and config.schema.dims != [variant.dim]):
        return True
    changes = ((config.model, variant.model_changes), (config.optimizer, variant.optimizer_changes))
    return any(getattr(whole, key) != value for whole, changed in changes for key, value in changed.items())
