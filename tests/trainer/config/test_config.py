"""Configuration: round trips, and each wrong input named with its place."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from trainer.config import Config, load_config, preset, to_toml
from trainer.config.presets import PRESETS
from trainer.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_printed_preset_reads_back_equal(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(preset(name)))
    assert load_config(path) == preset(name)
    assert load_config(path).hash() == preset(name).hash()


def test_hashes_tell_configurations_apart() -> None:
    config = preset("quickstart")
    assert replace(config, seed=2).hash() != config.hash()
    assert replace(config, seed=2).schema.hash() == config.schema.hash()
    tasks = config.schema.tasks[:-1]
    assert replace(config.schema, tasks=tasks).hash() != config.schema.hash()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seed = 1", "sed = 1", "unknown field `sed`"),
        ("seed = 1", 'seed = "one"', r"Expected `int`, got `str` - at `\$\.seed`"),
        ('device = "cpu"', 'device = "tpu"', r"at `\$\.train\.device`"),
        ("bytes_limit = ", "bytes_limt = ", r"at `\$\.tables\[0\]`"),
        ("dim = 16\nbytes", "dim = 24\nbytes", r"features use dims \[16\], tables give dims \[24\]"),
        ('positive_task = "click"', 'positive_task = "clik"', "positive_task 'clik' is not one of"),
        ('kind = "dense"', 'kind = "single"', "bucket_edges belong to kind 'dense'"),
        ("update_limit = 20", "update_limit = -1", "update_limit must not be negative"),
        ('name = "follow"', 'name = "like"', "task names must be unique, found twice: like"),
        ("class_id = 3", "class_id = 4", "share class_id 4"),
        ("class_id = 3", "class_id = 4096", r"class_id must be in 0\.\.4095, found 4096"),
        ("seed = 1", "seed = ", "config.toml"),
    ],
)
def test_wrong_configuration_is_one_line_with_its_place(
    old: str, new: str, named: str, tmp_path: Path
) -> None:
    text = to_toml(preset("quickstart"))
    assert old in text
    path = tmp_path / "config.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_preset_are_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_config(Path("nowhere.toml"))
    with pytest.raises(ConfigError, match="unknown preset 'quikstart'; there are: kuairand, quickstart"):
        preset("quikstart")


def field_names(kind: type[msgspec.Struct]) -> list[str]:
    names = []
    for field in msgspec.structs.fields(kind):
        names.append(field.name)
        for inner in getattr(field.type, "__args__", (field.type,)):
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                names.extend(field_names(inner))
    return names


def test_every_field_is_read_somewhere() -> None:
    """An option that is accepted and then ignored is a lie; `preset` alone is a label."""
    sources = [
        path.read_text()
        for package in ("trainer", "param_server", "feature_eviction")
        for path in (REPOSITORY / package).rglob("*.py")
        if "_pb2" not in path.name
    ]
    code = "\n".join(sources)
    unread = [
        name
        for name in sorted(set(field_names(Config)) - {"preset"})
        if not re.search(rf"\.{name}\b(?!\s*=[^=])", code)
    ]
    assert unread == []
