"""The rules' simulator: what a replay counts, against plain loops, and the command around it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feature_eviction.keys import make_keys
from param_server.errors import RulesError
from param_server.rules_command import add_parser, load_rules, read_updates, report, synthetic_updates
from param_server.rules_config import RowRules, RulesConfig
from param_server.rules_simulation import Setting, Updates, simulate
from trainer.config.schema import table_name

ROOT = Path(__file__).resolve().parents[2]
SETTING = Setting(dim=4, row_format="float32", publish_every_s=1, score_decay_per_day=0.0)
ROW_BYTES = 8 + 4 * 4


def updates_of(*pairs: tuple[float, int]) -> Updates:
    times_s, ids = zip(*pairs, strict=True)
    keys_E, _ = make_keys(np.array(ids), class_id=4)
    return Updates(np.array(times_s, np.float64), keys_E, np.full(len(ids), 0.1, np.float32))


def test_without_rules_every_touched_row_goes_each_pass_and_nothing_is_stale():
    outcome = simulate(
        updates_of((10.0, 1), (10.5, 1), (10.6, 2), (11.2, 1)), rules=RulesConfig(), setting=SETTING
    )
    assert outcome.num_passes == 2
    assert outcome.bytes_sent == outcome.bytes_everything == 3 * ROW_BYTES
    assert outcome.times_fewer_bytes == 1.0
    assert [outcome.staleness_s(q) for q in (0.5, 0.99, 1.0)] == [0, 0, 0]
    assert outcome.held_back == {}


def test_a_limited_row_is_stale_until_its_window_ends_and_is_counted():
    """Pushed at 11; held at 12, 13, 14 and 15, each time with an update of the second before; gone at 16."""
    rules = RulesConfig(update_limit=1, update_limit_window_s=5)
    updates = updates_of(*((10.0 + second, 1) for second in range(6)))
    outcome = simulate(updates, rules=rules, setting=SETTING)
    assert outcome.num_pushed == 2
    assert outcome.held_back == {"update_limit": 4}
    assert outcome.staleness_S.tolist() == [2, 1, 1, 1, 1]
    assert (outcome.staleness_s(0.5), outcome.staleness_s(1.0)) == (1, 4)
    assert outcome.num_pending == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_replay_equals_plain_loops(seed):
    rng = np.random.default_rng(seed)
    times_s = np.sort(rng.uniform(100, 130, 400))
    ids = rng.integers(0, 12, 400)
    rules = RulesConfig(min_updates=3, min_updates_window_s=4, min_gathered_score=0.25, refresh_after_s=9)
    outcome = simulate(updates_of(*zip(times_s, ids, strict=True)), rules=rules, setting=SETTING)
    rows = {one: {"n": 0, "begun": 0, "gain": 0.0, "oldest": None, "pushed": None} for one in range(12)}
    pushed, stale, at = 0, [], 0
    for now_s in range(101, 131):
        touched = []
        while at < 400 and times_s[at] < now_s:
            row = rows[int(ids[at])]
            if not row["n"]:
                row["begun"] = int(times_s[at])
            row["n"] += 1
            row["gain"] += 0.1
            row["oldest"] = row["oldest"] or times_s[at]
            touched.append(row)
            at += 1
        for row in rows.values():
            if row["oldest"] is None:
                continue
            old = row["pushed"] is not None and now_s - row["pushed"] > 9
            if old or (row["n"] >= 3 and row["gain"] >= 0.249):
                row.update(n=0, gain=0.0, oldest=None, pushed=now_s)
                pushed += 1
            elif row["n"] < 3 and now_s - row["begun"] > 4:
                row["n"] = 0
        stale += [0 if row["oldest"] is None else int(now_s - row["oldest"]) for row in touched]
    assert outcome.num_pushed == pushed > 20
    assert outcome.staleness_S.tolist() == np.bincount(stale).tolist()


def test_fewer_bytes_a_row_show_in_the_bytes_and_not_in_what_they_are_measured_against():
    updates = synthetic_updates(3000, num_ids=100, rate=100, seed=1)
    setting = Setting(dim=16, row_format="int8", publish_every_s=2, score_decay_per_day=0.02)
    outcome = simulate(updates, rules=RulesConfig(), setting=setting)
    assert outcome.bytes_sent == outcome.num_pushed * (8 + 24)
    assert outcome.bytes_everything == outcome.num_pushed * (8 + 64)
    assert f"{outcome.bytes_sent:>14}    2.2x" in report({"everything": outcome})


def test_rules_of_the_table_give_what_the_same_rules_in_general_give():
    """The table has the name that a trainer gives to its tables; another table's rules concern nobody."""
    limits = {"update_limit": 1, "update_limit_window_s": 7, "min_updates": 2}
    updates = synthetic_updates(3000, num_ids=100, rate=100, seed=1)

    def told(rules: RulesConfig) -> str:
        return report({"rules": simulate(updates, rules=rules, setting=SETTING)})

    general = told(RulesConfig(**limits))
    assert "few_updates" in general
    assert "update_limit" in general
    assert told(RulesConfig(by_table={table_name(SETTING.dim): RowRules(**limits)})) == general
    assert told(RulesConfig(by_table={"dim16": RowRules(**limits)})) == told(RulesConfig()) != general


def test_classes_of_the_file_follow_their_own_rules(tmp_path):
    path = tmp_path / "updates.csv"
    path.write_text("time,id,class,score\n12,1,4,\n10,1,4,0.5\n10,1,5,0.5\n11,7,5,1\n")
    updates = read_updates(path)
    assert updates.times_s_E.tolist() == [10, 10, 11, 12]
    assert updates.gains_E.tolist() == pytest.approx([0.5, 0.5, 1.0, 0.1])
    rules = RulesConfig(by_class={"5": RowRules(min_updates=9)})
    outcome = simulate(updates, rules=rules, setting=SETTING)
    assert (outcome.num_pushed, outcome.num_pending) == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,ids\n1,1\n", "columns ['id'] are missing"),
        ("time,id\n1,1\n2,x\n", "line 3: invalid literal"),
        ("time,id\nnan,1\n", "line 2: time, id or class is out of range"),
        ("time,id,class\n1,1,9999\n", "line 2: time, id or class is out of range"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "updates.csv"
    path.write_text(text)
    with pytest.raises(RulesError) as caught:
        read_updates(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "updates.csv"
    path.write_bytes("time,id,class\n1,1,\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"))
    with pytest.raises(RulesError, match=r"updates\.csv: after line \d: .* it must be UTF-8"):
        read_updates(path)


def test_one_time_far_from_the_others_is_refused_and_not_passed_over_second_by_second(tmp_path):
    path = tmp_path / "updates.csv"
    path.write_text("time,id\n0,1\n1700000000,2\n")
    with pytest.raises(RulesError, match=r"between 0 and 1700000000 s, which is 1700000001 passes"):
        simulate(read_updates(path), rules=RulesConfig(), setting=SETTING)


def test_rules_come_from_a_preset_or_a_file(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("update_limit = 3\n[by_class.4]\nmin_updates = 2\n")
    assert load_rules(str(path)).by_class["4"].min_updates == 2
    assert load_rules("paddle_ctr").min_score == 1.5
    path.write_text("update_limits = 3\n")
    with pytest.raises(RulesError, match=r"rules\.toml: .*update_limits"):
        load_rules(str(path))
    with pytest.raises(RulesError, match="no rules preset and no file; presets: everything"):
        load_rules("padle")


def test_the_command_shows_rules_side_by_side_and_draws_them(tmp_path):
    drawing = tmp_path / "staleness.svg"
    arguments = ("--synthetic", "20000", "--ids", "500", "--rules", "everything", "--rules", "pepnet")
    done = subprocess.run(
        [sys.executable, "-m", "param_server", "rules", "simulate", *arguments, "--plot", str(drawing)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("20000 updates, 10 passes.")
    assert lines[2].split()[0] == "everything"
    assert lines[2].split()[2] == "1.0x"
    assert float(lines[3].split()[2].rstrip("x")) > 1
    assert "few_updates" in lines[3]
    assert b"<svg" in drawing.read_bytes()


def test_a_plot_that_could_not_be_written_is_refused_before_the_simulation(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    away = tmp_path / "away" / "staleness.svg"
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["rules", "simulate", "--synthetic", "9", "--rules", "pepnet", "--plot", str(away)])
    assert f"argument --plot: {away}: there is no folder" in capsys.readouterr().err
