"""docs/add_a_model.md does what it says: its file, its commands, as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from param_server.client import INPUT_NAME, OUTPUT_NAME
from trainer.collectives import Ranks
from trainer.config import load_config
from trainer.data.synthetic import SyntheticStream
from trainer.publish.program import dense_weights, export_program
from trainer.recommender import Recommender

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENT = (REPOSITORY / "docs" / "add_a_model.md").read_text()
IMPRESSIONS = 3000


def block(kind: str) -> str:
    """The document's one block of that kind."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def commands() -> list[str]:
    return [line.removeprefix("$ ") for line in block("console").splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's folder with the file that the document shows, where it says that it lies."""
    named = re.search(r"`(my_models/\w+\.py)`", DOCUMENT)
    assert named is not None
    file = tmp_path / named.group(1)
    file.parent.mkdir()
    file.write_text(block("python"))
    return tmp_path


@pytest.fixture
def shell(folder: Path) -> Callable[[str], str]:
    """A command in that folder, with this repository installed in no other way than on the path."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


def test_the_documents_model_trains_and_is_exported(
    ranks: Ranks, folder: Path, shell: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    *configure, _ = commands()
    for command in configure:
        shell(command)
    config = load_config(folder / "two_towers.toml")
    assert config.model.name == "my_models.two_towers:TwoTowers"
    assert config.model.options == {"vector_width": 8}

    monkeypatch.syspath_prepend(str(folder))
    recommender = Recommender(config, ranks=ranks)
    model = recommender.dense
    assert type(model).__name__ == "TwoTowers"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stream = SyntheticStream(config).batches(config.train.batch_size)
    for _ in range(5):
        batch = next(stream)[0]
        recommender.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []

    program = export_program(model, embedding_width=recommender.layout.width)
    options = onnxruntime.SessionOptions()
    weights = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in dense_weights(model).items()
    }
    for name, value in weights.items():
        options.add_initializer(name, value)
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    embedding_BE = torch.randn(9, recommender.layout.width)
    with torch.no_grad():
        expected = torch.sigmoid(model(embedding_BE, None)).numpy()
    found = session.run([OUTPUT_NAME], {INPUT_NAME: embedding_BE.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_the_documents_commands_serve_the_model(folder: Path, shell: Callable[[str], str]) -> None:
    """Through the whole path: replicas answer as training does at the end."""
    *configure, run = commands()
    assert "--impressions 20000" in run
    for command in configure:
        shell(command)
    shell(run.replace("--impressions 20000", f"--impressions {IMPRESSIONS}"))
    summary = json.loads((folder / "two-towers-run" / "summary.json").read_text())
    assert summary["impressions_trained"] == IMPRESSIONS
    assert all(check["passed"] for check in summary["checks"])


def test_the_document_quotes_errors_that_exist() -> None:
    source = (REPOSITORY / "trainer/model/outside.py").read_text()
    source += (REPOSITORY / "trainer/model/registry.py").read_text()
    quoted = (
        *("is a buffer of its state", "expected logits of shape"),
        *("uses the domain's index", "expected float32"),
    )
    for words in quoted:
        assert words in DOCUMENT
        assert words in source
