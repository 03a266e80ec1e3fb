"""The trained model against the plain one of the benchmarks: logits, and the gradient of every weight."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from benchmarks.plain_pepnet import PlainPEPNet, copy_weights
from trainer.config import preset
from trainer.config.config import ModelConfig
from trainer.model import PEPNet, multi_task_loss
from trainer.model.compiled import compile_dense, missing_compiler
from trainer.model.layout import FeatureLayout

NUM_TASKS = 3
BATCH = 9


def make(dtype: torch.dtype, **changes: Any) -> tuple[PEPNet, PlainPEPNet, FeatureLayout]:
    torch.manual_seed(0)
    layout = FeatureLayout.of(preset("quickstart").schema)
    config = replace(ModelConfig(tower_widths=(12, 8), gate_hidden=10), **changes)
    model = PEPNet(layout, num_tasks=NUM_TASKS, config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    plain = PlainPEPNet(layout, num_tasks=NUM_TASKS, config=config)
    copy_weights(model, plain)
    return model.to(dtype), plain.to(dtype), layout


def loss_of(forward: Any, embedding_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the embeddings; the weights' gradients are left on them."""
    generator = torch.Generator().manual_seed(3)
    labels_BT = (torch.rand(BATCH, NUM_TASKS, generator=generator) < 0.4).to(embedding_BE.dtype)
    known_BT = (torch.rand(BATCH, NUM_TASKS, generator=generator) < 0.8).to(embedding_BE.dtype)
    leaf_BE = embedding_BE.clone().requires_grad_(True)
    logits_BT = forward(leaf_BE)
    weight_T = torch.tensor([1.0, 0.5, 2.0])
    multi_task_loss(logits_BT, labels_BT=labels_BT, known_BT=known_BT, weight_T=weight_T).backward()
    assert leaf_BE.grad is not None
    return logits_BT.detach(), leaf_BE.grad


@pytest.mark.parametrize("epnet_input", ["domain_and_embedding", "domain"])
@pytest.mark.parametrize("gate_gamma", [2.0, 3.0])
def test_model_equals_the_plain_one_in_logits_and_gradients(epnet_input: str, gate_gamma: float) -> None:
    model, plain, layout = make(torch.float64, epnet_input=epnet_input, gate_gamma=gate_gamma)
    embedding_BE = torch.randn(BATCH, layout.width, dtype=torch.float64)
    logits_BT, gradient_BE = loss_of(model, embedding_BE)
    plain_logits_BT, plain_gradient_BE = loss_of(plain, embedding_BE)
    torch.testing.assert_close(logits_BT, plain_logits_BT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_BE, plain_gradient_BE, rtol=1e-12, atol=1e-12)

    # Gradients move into the weights' places, and from there the way that weights take.
    model_grads, plain_grads = (
        {name: p.grad for name, p in network.named_parameters()} for network in (model, plain)
    )
    with torch.no_grad():
        for network, grads in ((model, model_grads), (plain, plain_grads)):
            for name, parameter in network.named_parameters():
                gradient = grads[name]
                assert gradient is not None, name
                parameter.copy_(gradient)
    expected = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    copy_weights(model, plain)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-11, atol=1e-11, msg=name)


def test_first_weights_are_drawn_from_the_plain_distributions() -> None:
    """The same bound for every matrix, however the model cuts it up."""
    torch.manual_seed(0)
    layout = FeatureLayout.of(preset("quickstart").schema)
    config = ModelConfig(tower_widths=(64, 32), gate_hidden=32)
    model = PEPNet(layout, num_tasks=NUM_TASKS, config=config)
    plain, moved = (PlainPEPNet(layout, num_tasks=NUM_TASKS, config=config) for _ in range(2))
    copy_weights(model, moved)
    for (name, mine), (_, theirs) in zip(moved.named_parameters(), plain.named_parameters(), strict=True):
        if mine.numel() > 2_000:
            assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.05), name
            assert mine.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02), name


def test_bfloat16_is_near_and_leaves_float32_gradients() -> None:
    model, plain, layout = make(torch.float32)
    embedding_BE = torch.randn(BATCH, layout.width)

    def reduced(x_BE: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x_BE).float()

    logits_BT, gradient_BE = loss_of(reduced, embedding_BE)
    expected_BT, expected_gradient_BE = loss_of(plain, embedding_BE)
    scale = expected_BT.abs().max().item()
    torch.testing.assert_close(logits_BT, expected_BT, rtol=0, atol=0.02 * scale)
    assert not torch.equal(logits_BT, expected_BT)
    assert gradient_BE.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    cosine = torch.nn.functional.cosine_similarity(gradient_BE.flatten(), expected_gradient_BE.flatten(), 0)
    assert cosine > 0.999


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_equals_the_plain_one() -> None:
    model, plain, layout = make(torch.float32)
    embedding_BE = torch.randn(BATCH, layout.width)
    forward = compile_dense(model, num_rows=BATCH, width=layout.width, precision=torch.float32)
    assert forward is not model
    assert all(p.grad is None for p in model.parameters())
    logits_BT, gradient_BE = loss_of(forward, embedding_BE)
    expected_BT, expected_gradient_BE = loss_of(plain, embedding_BE)
    torch.testing.assert_close(logits_BT, expected_BT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_BE, expected_gradient_BE, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_the_model_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in (missing_compiler("cpu") or "")
    model, _, layout = make(torch.float32)
    forward = compile_dense(model, num_rows=BATCH, width=layout.width, precision=torch.float32)
    assert forward is model
