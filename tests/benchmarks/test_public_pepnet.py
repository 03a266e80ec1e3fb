"""The public implementation: the stream that it gets is ours, and a peer that is not there is said to be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from benchmarks.peer_environment import PeerMissingError, environment
from benchmarks.public_pepnet import PEERS, peer_width, write_stream
from trainer.config import preset
from trainer.data.synthetic import SyntheticStream


@pytest.fixture(scope="module")
def config():
    return replace(preset("quickstart"), impressions=700)


@pytest.fixture(scope="module")
def stream(config):
    return list(SyntheticStream(config).batches(config.train.batch_size))


def test_the_peer_reads_every_id_as_one_number_and_never_the_padding(config, stream, tmp_path: Path):
    settings = write_stream(stream, config, tmp_path / "stream.npz")
    with np.load(tmp_path / "stream.npz", allow_pickle=False) as file:
        ids_NF, tags_NL, labels_NT = file["ids_NF"], file["tags_NL"], file["labels_NT"]
    users_N = np.concatenate([part.user_ids_N for part, _ in stream])
    place = list(settings["features"]).index("user_id")
    pairs = set(zip(users_N.tolist(), ids_NF[:, place].tolist(), strict=True))
    assert len(pairs) == len(np.unique(users_N)) == settings["features"]["user_id"]
    assert ids_NF.min() == 1
    assert ids_NF.max(axis=0).tolist() == list(settings["features"].values())
    lengths_N = np.concatenate([part.sparse["tags"].lengths_N for part, _ in stream])
    assert (tags_NL > 0).sum(axis=1).tolist() == lengths_N.tolist()
    assert tags_NL.max() == settings["num_tags"]
    assert np.array_equal(labels_NT, np.concatenate([part.labels_NT for part, _ in stream]))


def test_the_peer_is_as_wide_as_the_wanted_weights_need(config, stream, tmp_path: Path):
    settings = write_stream(stream, config, tmp_path / "stream.npz")
    for peer in PEERS.values():
        widths = [peer_width(settings, peer, wanted=wanted) for wanted in (1, 200_000, 400_000)]
        assert widths[0] == 4
        assert widths == sorted(set(widths))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_an_environment_is_made_once_and_one_that_cannot_be_made_says_why(tmp_path: Path):
    missing = f"freshet-absent @ file://{tmp_path / 'absent-1.0-py3-none-any.whl'}"
    with pytest.raises(PeerMissingError, match="absent"):
        environment(tmp_path / "env", [missing])
    with pytest.raises(PeerMissingError, match="nothing may be installed"):
        environment(tmp_path / "env", [missing], install=False)
    # What was broken off is not taken for made.
    python = environment(tmp_path / "env", ["pip"])
    command = [str(python), "-c", "import sys; print(sys.prefix)"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(tmp_path / "env")
    made = (tmp_path / "env" / "pyvenv.cfg").stat().st_mtime_ns
    assert environment(tmp_path / "env", ["pip"]) == python
    assert (tmp_path / "env" / "pyvenv.cfg").stat().st_mtime_ns == made


@pytest.mark.slow
def test_an_absent_peer_is_said_to_be_skipped(run_benchmark, tmp_path: Path):
    arguments = ("--no-install", "--env", str(tmp_path), "--seeds", "1", "--impressions", "2000")
    record, output = run_benchmark("public_pepnet", *arguments)
    assert [row["model"] for row in record["rows"]] == ["freshet"]
    assert "SKIPPED mlgb" in output


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_peers_gate_and_embeddings_get_gradients_and_never_move_where_it_is_here(run_benchmark):
    arguments = ("--no-install", "--seeds", "1", "--impressions", "2000")
    record, output = run_benchmark("public_pepnet", *arguments)
    rows = {row["model"]: row for row in record["rows"]}
    assert ("mlgb" in rows) != ("SKIPPED mlgb" in output)
    if "mlgb" not in rows:
        return
    assert set(rows) == {"freshet", *PEERS}
    for state in record["facts"]["hidden"].values():
        assert (state["in_parameters"], state["in_state_dict"], state["largest_change"]) == (0, 0, 0.0)
        assert state["with_gradient"] == state["tensors"] > 0
    ours = rows["freshet"]["dense_weights"]
    for name in PEERS:
        assert ours <= rows[name]["dense_weights"] < 1.1 * ours
        # As it comes not even the dense ones are all trained.
        assert (rows[name]["trained_weights"] < rows[name]["dense_weights"]) == (name == "mlgb")
