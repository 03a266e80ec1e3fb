"""The configuration reference: the committed page is what the classes say, and nothing is missing in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_origin

import msgspec
import pytest
from msgspec.structs import fields

from trainer.__main__ import main
from trainer.config import Config, load_config
from trainer.config.reference import reference

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = REPOSITORY / "docs" / "configuration.md"


class Undescribed(msgspec.Struct):
    """A section."""

    told: int = 1
    """Has words."""
    untold: int = 2


def described(page: str) -> dict[str, dict[str, list[str]]]:
    """Header of a section -> key -> type, default and description."""
    found: dict[str, dict[str, list[str]]] = {}
    for section in page.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = {
            match[1]: re.split(r"(?<!\\) \| ", match[2])
            for match in re.finditer(r"^\| `(\w+)` \| (.*) \|$", body, re.MULTILINE)
        }
        found |= dict.fromkeys(re.findall(r"`(.*?)`", title) or [""], rows)
    return found


def keys(kind: type[msgspec.Struct], header: str = "", path: str = "") -> dict[str, set[str]]:
    """Header of a section -> its keys, in the words of TOML."""
    found = {header: {field.name for field in fields(kind)}}
    for field in fields(kind):
        origin, inner_path = get_origin(field.type), f"{path}{field.name}"
        for inner in (field.type, *get_args(field.type)):
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                inner_path += ".NAME" if origin is dict else ""
                inner_header = f"[[{inner_path}]]" if origin is tuple else f"[{inner_path}]"
                found |= keys(inner, inner_header, f"{inner_path}.")
    return found


def test_the_committed_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is not: python -m trainer config --reference > docs/configuration.md"""
    assert main(["config", "--reference"]) == 0
    assert PAGE.read_text() == capsys.readouterr().out


@pytest.mark.parametrize("other", [("--preset", "paper"), ("--optimizer", "adam")])
def test_the_page_is_of_no_preset_and_no_optimizer(
    other: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["config", "--reference", *other])
    except SystemExit as refused:
        code = int(refused.code or 0)
    assert code != 0
    assert other[0] in capsys.readouterr().err


def test_every_key_is_on_the_page_with_type_default_and_description() -> None:
    page = described(PAGE.read_text())
    assert {header: set(rows) for header, rows in page.items()} == keys(Config)
    for header, rows in page.items():
        for key, cells in rows.items():
            assert len(cells) == 3, (header, key)
            assert all(cells), (header, key)


def test_defaults_on_the_page_are_those_of_a_file_that_leaves_them_out(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        """
        preset = "least"
        tables = [{ dim = 16, bytes_limit = 1_000_000 }]
        [schema]
        domains = ["home"]
        tasks = [{ name = "click" }]
        positive_task = "click"
        features = [{ name = "item_id", class_id = 1, dim = 16 }]
        """
    )
    least = msgspec.json.decode(msgspec.json.encode(load_config(path)))
    page = described(PAGE.read_text())
    for name in ("model", "optimizer", "train", "kafka", "publish", "checkpoint", "serving", "produce"):
        for key, (_, default, _) in page[f"[{name}]"].items():
            if default.startswith("`"):
                assert msgspec.json.decode(default.strip("`")) == least[name][key], (name, key)
    assert page["[[schema.features]]"]["ttl_s"][1] == "unset"
    assert page["[[schema.features]]"]["name"][1] == "required"


def test_a_key_without_a_docstring_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"Undescribed\.untold has no docstring"):
        reference(Undescribed)
