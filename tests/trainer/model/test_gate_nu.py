"""The gate's own backward pass is the one that autograd finds."""

from __future__ import annotations

import pytest
import torch

from trainer.model.gate_nu import GateInput, gated, xavier_uniform


@pytest.mark.parametrize("h_shape", [(3, 5, 4), (1, 5, 4)])
def test_gated_has_the_gradients_of_its_equation(h_shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    h = torch.randn(*h_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gated, (z, h))
    expected = torch.autograd.grad((torch.sigmoid(z) * h).square().sum(), (z, h))
    found = torch.autograd.grad(gated(z, h).square().sum(), (z, h))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gated_without_gradients_is_the_same_value() -> None:
    z, h = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6)
    with torch.no_grad():
        assert torch.equal(gated(z, h), torch.sigmoid(z) * h)
    assert torch.equal(gated(z, h), torch.sigmoid(z) * h)


def test_a_closed_gate_and_an_open_one_stay_finite() -> None:
    z = torch.tensor([-200.0, 200.0], requires_grad=True)
    h = torch.tensor([3.0, 3.0], requires_grad=True)
    gated(z, h).sum().backward()
    assert z.grad is not None
    assert h.grad is not None
    assert z.grad.tolist() == [0.0, 0.0]
    assert h.grad.tolist() == [0.0, 1.0]


def test_gate_input_never_sends_a_gradient_to_what_it_only_sees() -> None:
    gate_input = GateInput(prior_width=4, seen_width=6, width_hidden=5, num_gates=2)
    prior = torch.randn(3, 4, requires_grad=True)
    seen = torch.randn(3, 6, requires_grad=True)
    first, second = gate_input(prior, seen)
    assert first.shape == second.shape == (3, 5)
    (first.sum() + second.sum()).backward()
    assert prior.grad is not None
    assert seen.grad is None


def test_parts_of_a_matrix_are_drawn_within_the_whole_matrix_bound() -> None:
    torch.manual_seed(0)
    part = torch.empty(100, 40)
    xavier_uniform(part, fan_in=300, fan_out=300)
    assert part.abs().max() <= 0.1
    assert part.abs().max() > 0.099
