"""What a configuration may say where it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import load_config, preset, to_toml
from trainer.errors import ConfigError

WHOLE = to_toml(preset("quickstart"))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('device = "cpu"', 'device = "tpu"', r"'tpu' - at `\$\.train\.device`: expected one of cpu, cuda$"),
        (
            'role = "user"',
            'role = "usr"',
            r"at `\$\.schema\.features\[1\]\.role`: expected one of author, domain, item, other, user$",
        ),
        ('order = "loose"', 'order = "tight"', r"`\$\.kafka\.order`: expected one of loose, strict$"),
        ("batch_size =", "batchsize =", r"field `batchsize` - at `\$\.train`: did you mean batch_size\?$"),
        (
            'positive_task = "click"',
            'positive_task = "click"\nzzz = 1',
            r"field `zzz` - at `\$\.schema`: there are features, domains, tasks, positive_task$",
        ),
        ("impressions = ", "impresions = ", r"unknown field `impresions`: did you mean impressions\?$"),
        ("dim = 16\n", 'dim = "16"\n', r"Expected `int`, got `str` - at `\$\.schema\.features\[0\]\.dim`$"),
    ],
)
def test_the_choices_or_the_closest_key_are_named(old: str, new: str, named: str, tmp_path: Path) -> None:
    assert old in WHOLE
    path = tmp_path / "wrong.toml"
    path.write_text(WHOLE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=rf"wrong\.toml: .*{named}"):
        load_config(path)
