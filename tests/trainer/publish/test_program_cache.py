"""The exported program is kept from start to start, and never believed where it is not whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from trainer.collectives import Ranks
from trainer.config import Config
from trainer.publish.program_cache import cached_program, program_key, program_of
from trainer.recommender import Recommender

PROGRAM = bytes(range(256)) * 100


class Exporter:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return PROGRAM


def test_a_second_start_reads_what_the_first_one_exported(tmp_path: Path) -> None:
    export = Exporter()
    path = tmp_path / "new" / "program.cache"
    assert [cached_program(path, key="k", export=export) for _ in range(3)] == [PROGRAM] * 3
    assert export.calls == 1
    assert [file.name for file in path.parent.iterdir()] == ["program.cache"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:2000] + b"\x00\x01" + data[2002:],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: b"x" * 5000,
        lambda data: data.replace(b'"format":1', b'"format":2'),
        lambda data: data.replace(b'"num_bytes"', b'"num_byte"'),
    ],
)
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    export = Exporter()
    path = tmp_path / "program.cache"
    cached_program(path, key="k", export=export)
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    assert cached_program(path, key="k", export=export) == PROGRAM
    assert export.calls == 2
    assert path.read_bytes() == whole


def test_a_program_of_another_key_is_replaced(tmp_path: Path) -> None:
    export = Exporter()
    for key in ("k", "other", "k"):
        cached_program(tmp_path / "program.cache", key=key, export=export)
    assert export.calls == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_the_key_follows_what_the_program_is_made_of(make_config: Callable[..., Config]) -> None:
    config = make_config()
    alike = [
        replace(config, seed=5),
        replace(config, model=replace(config.model, compile=True)),
    ]
    others = [
        replace(config, model=replace(config.model, gate_hidden=9)),
        replace(config, model=replace(config.model, epnet_gate="field")),
        replace(config, schema=replace(config.schema, tasks=config.schema.tasks[:-1])),
    ]
    key = program_key(config, embedding_width=4)
    assert {program_key(one, embedding_width=4) for one in alike} == {key}
    keys = {program_key(one, embedding_width=4) for one in others} | {program_key(config, embedding_width=5)}
    assert len(keys | {key}) == len(others) + 2


def test_the_kept_program_is_the_exported_one_and_is_there_at_once(
    make_config: Callable[..., Config], ranks: Ranks, tmp_path: Path
) -> None:
    config = make_config(bytes_limit=256 << 10)
    recommender = Recommender(config, ranks=ranks)
    exported = program_of(recommender, config=config, path=None)
    assert program_of(recommender, config=config, path=tmp_path / "program.cache") == exported
    started_s = time.perf_counter()
    assert program_of(recommender, config=config, path=tmp_path / "program.cache") == exported
    assert time.perf_counter() - started_s < 0.5
