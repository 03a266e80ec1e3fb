"""What a run needs from outside is missed before anything is started."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from feature_eviction import FeatureEvictionError, ScoreConfig
from trainer.config import Config, preset
from trainer.errors import ConfigError, DataError
from trainer.run.plan import RunOptions
from trainer.run.preflight import check_inputs
from trainer.run.run_all import run_all


def test_unreachable_kafka_is_an_error_before_anything_starts(
    small_config: Config, options: RunOptions, free_port: Callable[[], int]
) -> None:
    server = f"127.0.0.1:{free_port()}"
    config = msgspec.structs.replace(
        small_config, kafka=msgspec.structs.replace(small_config.kafka, start_timeout_s=1)
    )
    with pytest.raises(ConfigError, match=f"--bootstrap-servers {server}: none could be reached"):
        run_all(config, replace(options, bootstrap_servers=server))
    assert not options.out_dir.exists()


def test_one_server_that_answers_is_enough(
    small_config: Config, options: RunOptions, free_port: Callable[[], int]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        servers = f"127.0.0.1:{free_port()},127.0.0.1:{listening.getsockname()[1]}"
        check_inputs(small_config, replace(options, bootstrap_servers=servers))
        assert listening.accept()[1][0] == "127.0.0.1"


@pytest.mark.parametrize("server", ["kafka", "kafka:", ":9092", "kafka:x", "kafka:70000"])
def test_address_without_host_or_port_is_refused(
    small_config: Config, options: RunOptions, server: str
) -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        check_inputs(small_config, replace(options, bootstrap_servers=server))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("pepnt", "unknown model 'pepnt'; the closest are pepnet"),
        ("nowhere_at_all:Model", "there is no module 'nowhere_at_all'"),
    ],
)
def test_a_model_that_cannot_be_built_or_served_is_refused_before_anything_starts(
    small_config: Config, options: RunOptions, name: str, named: str
) -> None:
    model = msgspec.structs.replace(small_config.model, name=name)
    with pytest.raises(ConfigError, match=named):
        run_all(msgspec.structs.replace(small_config, model=model), options)
    assert not options.out_dir.exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"device": "cuda"}}, "train.device is 'cuda', and PyTorch sees no GPU"),
        ({"model": {"options": {"x": 1}}}, "'x' is for a model of your own"),
        ({"table": {"bytes_limit": 10}}, "bytes_limit 10 over 1 ranks holds no row"),
        ({"table": {"score": ScoreConfig(kind="nowhere_at_all:fn")}}, "nowhere_at_all"),
        ({"role": "other"}, "EPNet needs at least one feature with role 'domain'"),
        ({"feature": "shoe_size"}, r"synthetic stream has no features shoe_size.*docs/your_data\.md"),
    ],
    ids=["device", "option", "bytes", "score", "role", "stream"],
)
def test_what_the_trainer_would_refuse_is_refused_before_anything_starts(
    options: RunOptions, changes: dict[str, Any], named: str
) -> None:
    config = preset("quickstart")
    check_inputs(config, options)
    replaced = msgspec.structs.replace
    features = list(config.schema.features)
    if "role" in changes:
        features = [replaced(one, role=changes["role"]) for one in features]
    if "feature" in changes:
        features[2] = replaced(features[2], name=changes["feature"])
    config = replaced(
        config,
        schema=replaced(config.schema, features=tuple(features)),
        train=replaced(config.train, **changes.get("train", {})),
        model=replaced(config.model, **changes.get("model", {})),
        tables=(replaced(config.tables[0], **changes.get("table", {})),),
    )
    with pytest.raises((ConfigError, FeatureEvictionError), match=named):
        run_all(config, options)
    assert not options.out_dir.exists()


def test_recording_that_may_not_be_read_is_refused(
    small_config: Config, options: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "log.csv"
    data.touch(mode=0o000)
    # Root may read everything; what is tested is what follows from the system's answer.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"log\.csv: may not be read"):
        check_inputs(small_config, replace(options, data=data))


COLUMNS = (
    "user_id,video_id,time_ms,duration_ms,is_click,is_follow,is_forward,is_comment,long_view,is_like_or_hate"
)
LINES = "".join(f"{n % 7},{n},{1000 * n},9000,1,0,0,0,1,{n % 2}\n" for n in range(2000))


def record(path: Path, text: str, *, cut: int = 0) -> Path:
    """A recording; gzipped as its name says, and without its last `cut` bytes."""
    data = gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()
    path.write_bytes(data[: len(data) - cut])
    return path


@pytest.mark.parametrize(
    ("name", "text", "cut", "named"),
    [
        (
            "trace.csv",
            COLUMNS.replace("time_ms,", "") + "\n",
            0,
            r"trace\.csv: column time_ms is missing; the file has user_id",
        ),
        (
            "trace.csv.gz",
            f"{COLUMNS}\n{LINES}",
            100,
            r"trace\.csv\.gz: not readable after line 2 .*end-of-stream",
        ),
        ("trace.csv", f"{COLUMNS}\n{LINES}1,2\n", 0, r"trace\.csv, line 2002: expected 10 fields, found 2"),
        (
            "trace.csv",
            f"{COLUMNS}\n1,2,soon,9000,1,0,0,0,1,1\n",
            0,
            r"line 2: column time_ms must be a whole number",
        ),
        ("trace.csv", f"{COLUMNS}\n", 0, r"trace\.csv: has column names, but no impression below them"),
        ("trace.csv", "", 0, r"trace\.csv: the file is empty"),
    ],
    ids=["column", "cut-gzip", "fields", "number", "no-lines", "empty"],
)
def test_faulty_recording_is_an_error_before_anything_starts(
    options: RunOptions, tmp_path: Path, name: str, text: str, cut: int, named: str
) -> None:
    data = record(tmp_path / name, text, cut=cut)
    with pytest.raises(DataError, match=named):
        run_all(preset("kuairand"), replace(options, data=data))
    assert not options.out_dir.exists()


def test_whole_recording_passes(options: RunOptions, tmp_path: Path) -> None:
    data = record(tmp_path / "trace.csv.gz", f"{COLUMNS}\n{LINES}")
    check_inputs(preset("kuairand"), replace(options, data=data))
    with pytest.raises(ConfigError, match="KuaiRand has no features"):
        check_inputs(preset("quickstart"), replace(options, data=data))
