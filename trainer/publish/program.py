"""The dense model as an exported program that serving can run without importing `trainer`.

ONNX: a graph of data, so that loading it executes nothing. (torch.export's archive can fall back to
unpickling; docs/adr/0002.) Weights keep their parameter names, so that a version replaces them by name.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from contextlib import redirect_stdout

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from param_server.client import DOMAIN_INPUT_NAME, INPUT_NAME, OUTPUT_NAME
from trainer.model import uses_domain


class _Probabilities(nn.Module):
    """The model and the sigmoid that serving wants after it, under the model's own parameter names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        return torch.sigmoid(self.model(embedding_BE, domain_B))


def export_program(model: nn.Module, *, embedding_width: int) -> bytes:
    """ONNX bytes: `embeddings` float32 [B, embedding_width] → `probabilities` float32 [B, T].

    A model that uses the domain has a second input, `domains` int64 [B], an index into the schema's domains.
    Raises: RuntimeError if a parameter is not an initializer of the graph under its own name.
    """
    wrapped = _Probabilities(_with_distinct_weights(model)).eval()
    example: tuple[Tensor, ...] = (torch.zeros(2, embedding_width),)
    input_names = [INPUT_NAME]
    if uses_domain(model):
        example += (torch.zeros(2, dtype=torch.int64),)
        input_names.append(DOMAIN_INPUT_NAME)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exported = torch.export.export(wrapped, example, dynamic_shapes=tuple({0: batch} for _ in example))
        program = torch.onnx.export(
            exported,
            example,
            dynamo=True,
            input_names=input_names,
            output_names=[OUTPUT_NAME],
            external_data=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _strip_wrapper_name(proto)
    names = {initializer.name for initializer in proto.graph.initializer}
    missing = sorted(name for name, _ in model.named_parameters() if name not in names)
    if missing:
        raise RuntimeError(f"exported program: parameters {missing} are not initializers of the graph")
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _with_distinct_weights(model: nn.Module) -> nn.Module:
    """A copy in which no two parameters are equal: the exporter merges equal ones, such as zero biases.

    The same for every call, so that the program of a model is the same bytes in every generation. It has no
    gradients: the exporter sees the equations, not the backward passes that training brings along.
    """
    model = copy.deepcopy(model).to("cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return model


def _strip_wrapper_name(proto: onnx.ModelProto) -> None:
    """Give weights the model's own names: `model.x` → `x`."""

    def own(name: str) -> str:
        return name.removeprefix("model.")

    for initializer in proto.graph.initializer:
        initializer.name = own(initializer.name)
    for value in proto.graph.value_info:
        value.name = own(value.name)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = own(name)
        for index, name in enumerate(node.output):
            node.output[index] = own(name)
    del proto.metadata_props[:]


def dense_weights(model: nn.Module) -> dict[str, npt.NDArray[np.float32]]:
    """The parameters as a version carries them: contiguous float32 copies on the host, by name."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
        for name, parameter in model.named_parameters()
    }
