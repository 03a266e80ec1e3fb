"""docs/data.md states the generator's constants and the presets' options as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.config import Config, preset
from trainer.data import kuairand, kuairand_labels, population, synthetic

DOC = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()


def options_table() -> list[list[str]]:
    """Rows of [option, quickstart, seesaw, one_domain, what]."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in DOC.splitlines()]
    start = rows.index(["option", "quickstart", "seesaw", "one_domain", "what it does"])
    return rows[start + 2 : rows.index([""], start)]


def value_of(config: Config, option: str) -> float:
    return config.impressions if option == "impressions" else getattr(config.produce, option)


def test_the_options_of_the_presets_are_those_of_the_table():
    found = options_table()
    for option, *cells in found:
        if option == "domains":
            continue
        for name, cell in zip(("quickstart", "seesaw", "one_domain"), cells[:3], strict=True):
            assert float(cell.replace(",", "")) == value_of(preset(name), option), (option, name)
    assert len(found) == 10
    assert preset("one_domain").schema.domains == ("featured_video",)


@pytest.mark.parametrize(
    ("sign", "constants_T"),
    [
        ("α", synthetic.USER_SCALE_T),
        ("β", synthetic.ITEM_SCALE_T),
        ("γ", synthetic.TASTE_SCALE_T),
        ("δ", synthetic.AGE_SCALE_T),
        ("λ", synthetic.COMMON_LOADS_T),
    ],
)
def test_the_scales_of_the_equations_are_the_codes(sign, constants_T):
    (text,) = re.findall(rf"{sign} = ((?:-?\.?\d+(?:\.\d+)? ?)+)", DOC)
    assert [float(number) for number in text.split()] == pytest.approx(constants_T.tolist())


def test_every_feature_and_label_that_kuairand_has_is_named():
    assert f"{population.NUM_GROUPS} groups, {population.NUM_CATEGORIES} categories" in DOC
    for column in kuairand_labels.TASK_COLUMNS.values():
        assert f"`{column}`" in DOC, column
    for feature in kuairand.USER_WORDS + kuairand.VIDEO_WORDS:
        assert f"`{feature}`" in DOC or feature.endswith("_range") or feature.startswith("onehot_"), feature
    assert f"first {kuairand_labels.MEDIAN_IMPRESSIONS:,} impressions" in DOC
