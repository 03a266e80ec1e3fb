"""The exported program answers as the model does, with whatever weights a version brings."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from msgspec.structs import replace

from param_server.client import INPUT_NAME, OUTPUT_NAME
from trainer.config import preset
from trainer.model import PEPNet
from trainer.model.layout import FeatureLayout
from trainer.publish.program import dense_weights, export_program


def test_program_with_replaced_weights_equals_the_model() -> None:
    config = preset("quickstart")
    layout = FeatureLayout.of(config.schema)
    torch.manual_seed(1)
    model = PEPNet(layout, num_tasks=6, config=replace(config.model, tower_widths=(16, 8), gate_hidden=8))
    program = export_program(model, embedding_width=layout.width)
    assert program == export_program(model, embedding_width=layout.width)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    weights = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in dense_weights(model).items()
    }
    options = onnxruntime.SessionOptions()
    for name, value in weights.items():
        options.add_initializer(name, value)
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 500):
        embedding_BE = torch.randn(batch, layout.width)
        with torch.no_grad():
            expected = torch.sigmoid(model(embedding_BE)).numpy()
        found = session.run([OUTPUT_NAME], {INPUT_NAME: embedding_BE.numpy()})[0]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dense_weights_are_copies() -> None:
    layout = FeatureLayout.of(preset("quickstart").schema)
    model = PEPNet(layout, num_tasks=2, config=preset("quickstart").model)
    weights = dense_weights(model)
    before = weights["epnet.gate.weight"].copy()
    with torch.no_grad():
        model.epnet.gate.weight.add_(1.0)
    np.testing.assert_array_equal(weights["epnet.gate.weight"], before)
    assert set(weights) == {name for name, _ in model.named_parameters()}
