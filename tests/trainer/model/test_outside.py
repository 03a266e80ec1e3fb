"""A model from outside the package: found by its name, and refused for what training would trip over."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from trainer.config import preset
from trainer.errors import ConfigError
from trainer.model import build_model
from trainer.model.layout import FeatureLayout
from trainer.model.outside import code_of

MODELS = """
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self, layout, *, num_tasks, num_domains, config):
        super().__init__()
        self.out = nn.Linear(layout.width, num_tasks)

    def forward(self, embedding_BE, domain_B):
        return self.out(embedding_BE)

class ByDomain(Linear):
    uses_domain = True

    def __init__(self, layout, *, num_tasks, num_domains, config):
        super().__init__(layout, num_tasks=num_tasks, num_domains=num_domains, config=config)
        self.bias_DT = nn.Parameter(torch.zeros(num_domains, num_tasks))

    def forward(self, embedding_BE, domain_B):
        return self.out(embedding_BE) + self.bias_DT[domain_B]

class OneLogit(Linear):
    def forward(self, embedding_BE, domain_B):
        return self.out(embedding_BE)[:, :1]

class WithBuffers(Linear):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.norm = nn.BatchNorm1d(4)

class Half(Linear):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.half()

class WithoutConfig(Linear):
    def __init__(self, layout):
        super().__init__()

class Divides(Linear):
    def forward(self, embedding_BE, domain_B):
        return 1 // 0

class Multiplies(Linear):
    def forward(self, embedding_BE, domain_B):
        return self.out(embedding_BE[:, :3])

class Nothing(nn.Module):
    def __init__(self, *args, **options):
        super().__init__()

def not_a_module(*args, **options):
    return 3

NUMBER = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "someones_models.py").write_text(MODELS)
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere")
    (tmp_path / "half_written.py").write_text("from torch import not_there")
    (tmp_path / "misspelt.py").write_text("import torch\n\nclass Model(torchh.nn.Module):\n    pass\n")
    (tmp_path / "not_python.py").write_text("import torch\nclass Model(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "someones_models"
    sys.modules.pop("someones_models", None)


def build(name: str) -> torch.nn.Module:
    config = preset("quickstart")
    layout = FeatureLayout.of(config.schema)
    return build_model(layout, num_tasks=6, num_domains=3, config=replace(config.model, name=name))


@pytest.mark.parametrize("name", ["Linear", "ByDomain"])
def test_a_class_outside_the_package_is_built_by_its_name(module: str, name: str) -> None:
    assert type(build(f"{module}:{name}")).__name__ == name


def test_looking_a_model_over_leaves_the_random_numbers_where_they_were(module: str) -> None:
    torch.manual_seed(3)
    build(f"{module}:Linear")
    found = torch.rand(2)
    torch.manual_seed(3)
    torch.nn.Linear(160, 6)
    assert torch.equal(found, torch.rand(2))


def test_the_code_of_a_model_is_its_modules_file(module: str, tmp_path: Path) -> None:
    before = code_of(f"{module}:Linear")
    assert code_of(f"{module}:ByDomain") == before
    (tmp_path / f"{module}.py").write_text(MODELS + "# changed\n")
    assert code_of(f"{module}:Linear") != before


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("nowhere_at_all:Model", "there is no module 'nowhere_at_all'.*PYTHONPATH"),
        ("needs_more:Model", "there is no module 'not_installed_anywhere'"),
        ("half_written:Model", "cannot be imported: ImportError: cannot import name 'not_there'"),
        ("misspelt:Model", r"imported: NameError: name 'torchh' is not defined \(.*misspelt\.py, line 3\)$"),
        ("not_python:Model", r"cannot be imported: SyntaxError: .* \(not_python\.py, line 2\)$"),
        ("someones_models:WithoutConfig", "cannot be built: TypeError: .*unexpected keyword argument"),
        (
            "someones_models:Divides",
            r"forward fails .*: ZeroDivisionError: .*someones_models\.py, line \d+\)$",
        ),
        ("someones_models:Multiplies", r"forward fails .*: RuntimeError: .*someones_models\.py, line \d+\)$"),
        ("someones_models:Lnear", "no class or function 'Lnear'; it has .*Linear"),
        ("someones_models:NUMBER", "no class or function 'NUMBER'"),
        ("someones_models:", "expected module:Class"),
        (":Linear", "expected module:Class"),
        ("someones_models:not_a_module", r"expected a torch\.nn\.Module, found int"),
        ("someones_models:OneLogit", r"expected logits of shape \(2, 6\) .* found \(2, 1\)"),
        ("someones_models:WithBuffers", "'norm.num_batches_tracked' is a buffer of its state"),
        ("someones_models:Half", r"parameter 'out.weight' is torch\.float16, expected float32"),
        ("someones_models:Nothing", "no parameters to train"),
    ],
)
def test_what_training_would_trip_over_is_refused_with_its_name(module: str, name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        build(name)
    assert name in str(caught.value)
