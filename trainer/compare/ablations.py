"""PEPNet with one thing changed at a time (PEPNet, section 4.4; the goals in docs/compare.md)."""

from __future__ import annotations

from trainer.compare.plan import Variant

WHOLE = Variant(name="pepnet", model="pepnet")

ABLATIONS = (
    Variant(name="-EPNet", model="ppnet"),
    Variant(name="-PPNet", model="epnet"),
)
"""Each takes something away and must lose."""

SWEEPS = (
    *(
        Variant(name=f"gamma={gamma:g}", model="pepnet", model_changes={"gate_gamma": gamma})
        for gamma in (1.0, 3.0)
    ),
    *(Variant(name=f"dim={dim}", model="pepnet", dim=dim) for dim in (8, 40, 64)),
    Variant(name="towers 64", model="pepnet", model_changes={"tower_widths": (64,)}),
    Variant(name="towers 128-100-64", model="pepnet", model_changes={"tower_widths": (128, 100, 64)}),
)
"""Other sizes: gamma is 2, dim 16 and the towers 100-64 in the whole model. They may go either way."""


def variants() -> tuple[Variant, ...]:
    return (WHOLE, *ABLATIONS, *SWEEPS)
