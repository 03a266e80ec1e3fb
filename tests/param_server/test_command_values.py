"""python -m param_server: a value that nobody can mean is refused in one line that names it."""

from __future__ import annotations

import pytest

from param_server.__main__ import main

NOBODY = "127.0.0.1:1"
SIMULATE = ("rules", "simulate", "--rules", "everything", "--synthetic", "9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pin", NOBODY, "9999999999999999999.1"), "in 0..2^63-1, found 9999999999999999999.1"),
        (("promote", NOBODY, "1.9999999999999999999"), "in 0..2^63-1, found 1.9999999999999999999"),
        (("rollback", NOBODY, "9999999999999999999.1"), "in 0..2^63-1, found 9999999999999999999.1"),
        ((*SIMULATE, "--seed", "-1"), "--seed must not be negative, found -1"),
        ((*SIMULATE, "--publish-every-s", "9" * 30), "publish_every_s must be at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_value_out_of_range_ends_the_command_in_one_line(arguments, message, capsys):
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"param_server {arguments[0]}: ")
    assert message in error
    assert error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("command", "option", "least"),
    [
        ("shard", "--keep-full", 1),
        ("shard", "--num-shards", 1),
        ("shard", "--shard", 0),
        ("shard", "--snapshot-every", 0),
        ("shard", "--memory-mib", 0),
        ("replica", "--stale-after-s", 0),
    ],
)
def test_a_number_below_its_least_is_refused_before_anything_is_opened(
    command, option, least, tmp_path, capsys
):
    log_dir = tmp_path / "log"
    for text in (str(least - 1), "-5", "x"):
        with pytest.raises(SystemExit, match="2"):
            main([command, "--log-dir", str(log_dir), option, text])
        expected = f"argument {option}: expected a number of at least {least}, found {text}"
        assert expected in capsys.readouterr().err
    assert not log_dir.exists()
