from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feature_eviction import ClassPolicy, IdTable, ScoreConfig, TablePolicy, deduplicate, make_keys
from feature_eviction.dry_run import CALL_IDS, dry_run
from feature_eviction.event_file import Columns, EventFileError, Events, events_of
from feature_eviction.propose_ttl import GAPS_MAX, propose_ttls

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "feature_eviction", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def stream_file(tmp_path: Path) -> Path:
    """5000 lines, ten seconds apart: 200 users by number, items by name, one in ten clicked."""
    generator = np.random.default_rng(3)
    users = generator.zipf(1.3, 5000) % 200
    items = generator.integers(0, 1000, 5000)
    lines = [
        f"{user},item-{item},{1_700_000_000 + 10 * i},{int(i % 10 == 0)}"
        for i, (user, item) in enumerate(zip(users, items, strict=True))
    ]
    path = tmp_path / "stream.csv"
    path.write_text("\n".join(["user,item,time,click", *lines]) + "\n")
    return path


def test_proposed_lifetime_is_the_percentile_of_the_gaps(stream_file: Path) -> None:
    done = run("propose-ttl", stream_file, "--key", "user", "--key", "item", "--time", "time")
    assert (done.returncode, done.stderr) == (0, "")
    _, user, item = done.stdout.splitlines()
    last: dict[str, int] = {}
    gaps: dict[str, list[int]] = {"user": [], "item": []}
    for line in stream_file.read_text().splitlines()[1:]:
        user_id, item_id, time_s, _ = line.split(",")
        for name, raw in (("user", f"u{user_id}"), ("item", item_id)):
            if raw in last:
                gaps[name].append(int(time_s) - last[raw])
            last[raw] = int(time_s)
    for name, found in (("user", user.split()), ("item", item.split())):
        expected = int(np.quantile(gaps[name], 0.999, method="higher"))
        assert (found[0], int(found[3]), int(found[4])) == (name, len(gaps[name]), expected)
        longer = np.mean(np.array(gaps[name]) > expected)
        assert longer <= 0.001
        assert np.mean(np.array(gaps[name]) >= expected) >= 0.001


def test_class_whose_ids_come_once_has_no_proposal() -> None:
    events = Events(np.arange(50), np.arange(50), np.zeros(50, np.int64))
    (proposal,) = propose_ttls([events], num_classes=1)
    assert (proposal.num_ids, proposal.num_gaps, proposal.ttl_s) == (50, 0, None)


def test_sample_of_more_gaps_than_are_kept_stands_for_all_of_them() -> None:
    """One id whose gaps grow: kept first or last ones alone would propose something else."""
    num_gaps = GAPS_MAX + 300_000
    gaps = 1 + np.arange(num_gaps) // 1000
    times_s = np.concatenate([[0], np.cumsum(gaps)])
    pieces = [
        Events(np.zeros(len(part), np.int64), part, np.zeros(len(part), np.int64))
        for part in np.array_split(times_s, 40)
    ]
    (proposal,) = propose_ttls(pieces, num_classes=1, quantile=0.5)
    assert proposal.num_gaps == num_gaps
    assert proposal.ttl_s == pytest.approx(np.quantile(gaps, 0.5), rel=0.01)


def test_dry_run_evicts_what_the_table_would(stream_file: Path) -> None:
    policy = TablePolicy(
        num_slots=300, score=ScoreConfig(kind="lru"), classes=(ClassPolicy(class_id=1, ttl_s=4000),)
    )
    columns = Columns(keys=("user", "item"), time="time", label="click")
    result = dry_run(policy, events_of(stream_file, columns))
    table = IdTable(policy)
    ever: set[int] = set()
    admitted = re_entries = 0
    for piece in events_of(stream_file, columns):
        for start in range(0, len(piece.keys_N), CALL_IDS):
            part = slice(start, start + CALL_IDS)
            unique = deduplicate(piece.keys_N[part], piece.positives_N[part])
            mapped = table.map(
                unique.keys_U,
                shows_N=unique.shows_U,
                positives_N=unique.positives_U,
                now_s=int(piece.times_s_N[part].max()),
            )
            table.release(mapped.batch)
            re_entries += sum(key in ever for key in mapped.new_keys_M.tolist())
            admitted += len(mapped.new_keys_M)
            ever |= set(mapped.new_keys_M.tolist())
    last = result.points[-1]
    assert last.sightings == 10_000
    assert (last.evicted, last.rows) == (table.counters().evicted, table.num_rows)
    assert last.re_entries == re_entries == admitted - len(ever) > 0
    assert last.evicted["expired"] > 0


@pytest.mark.parametrize(("ending", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_dry_run_command_reports_draws_and_explains(
    stream_file: Path, tmp_path: Path, ending: str, begins: bytes
) -> None:
    picture = tmp_path / f"run.{ending}"
    arguments = ["--key", "user", "--time", "time", "--label", "click", "--num-slots", 50, "--ttl-s", 900]
    done = run("dry-run", stream_file, *arguments, "--plot", picture, "--why", 1, "--why", 10**6)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sightings       5000" in done.stdout
    assert "key 1 (class 0): held in slot" in done.stdout
    assert "key 1000000 (class 0): absent; no eviction of it is remembered" in done.stdout
    assert picture.read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("picture", "fault"),
    [
        ("away/run.svg", "there is no folder"),
        ("run.txt", "expected a file that ends in .svg or .png"),
        ("folder.svg", "cannot be written"),
    ],
)
def test_a_plot_that_could_not_be_written_is_refused_before_the_stream_is_read(
    tmp_path: Path, picture: str, fault: str
) -> None:
    (tmp_path / "folder.svg").mkdir()
    arguments = ["--key", "user", "--time", "time", "--num-slots", 50, "--plot", tmp_path / picture]
    done = run("dry-run", tmp_path / "no-such-stream.csv", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument --plot: {tmp_path / picture}: {fault}" in done.stderr


def test_dry_run_takes_a_whole_policy(stream_file: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('num_slots = 1\n[score]\nkind = "lfu"\n[[classes]]\nclass_id = 0\nmax_rows = 7\n')
    arguments = ["--key", "user", "--time", "time", "--num-slots", 50, "--policy", policy]
    done = run("dry-run", stream_file, *arguments)
    assert done.returncode == 0
    assert "rows held       7\n" in done.stdout
    assert "quota" in done.stdout


def test_keys_of_the_file_are_keys_of_the_table(stream_file: Path) -> None:
    columns = Columns(keys=("user", "item"), time="time", label="click")
    pieces = list(events_of(stream_file, columns))
    assert len(pieces) == 3
    piece = pieces[0]
    first = stream_file.read_text().splitlines()[1].split(",")
    assert piece.keys_N[0] == make_keys([int(first[0])], class_id=0)[0][0]
    assert piece.keys_N[1] >> 52 == 1
    assert piece.positives_N[:2].tolist() == [1, 1]
    assert sum(len(one.keys_N) for one in pieces) == 10_000


def test_every_label_above_0_is_a_positive(tmp_path: Path) -> None:
    path = tmp_path / "shares.csv"
    path.write_text("user,time,share\n1,1,0.25\n2,2,0\n3,3,-0.5\n4,4,1e-3\n5,5,2\n")
    (events,) = events_of(path, Columns(keys=("user",), time="time", label="share"))
    assert events.positives_N.tolist() == [1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,when\n1,2\n", r"columns \['time'\] are missing"),
        ("user,time\n1,2\n2,noon\n", r"lines 2\.\.3, column 'time': could not convert"),
        ("user,time\n1,-5\n", "must be unix seconds"),
        ("user,time\n1\n", "column 'time': a line ends before it"),
        ("time,user\n1,2\n3\n", r"lines 2\.\.3, column 'user': a line ends before it"),
    ],
)
def test_unreadable_file_is_refused_with_its_place(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(EventFileError, match=message):
        list(events_of(path, Columns(keys=("user",), time="time")))


def test_compressed_file_in_milliseconds_is_the_same_stream(stream_file: Path, tmp_path: Path) -> None:
    head, *lines = stream_file.read_text().splitlines()
    fields = [line.split(",") for line in lines]
    in_ms = [",".join([user, item, f"{seconds}789", click]) for user, item, seconds, click in fields]
    compressed = tmp_path / "stream.csv.gz"
    compressed.write_bytes(gzip.compress("\n".join([head, *in_ms]).encode()))
    columns = Columns(keys=("user", "item"), time="time", label="click")
    expected = list(events_of(stream_file, columns))
    found = list(events_of(compressed, columns._replace(time_is_ms=True)))
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["stream.csv", "cut.csv.gz", "none.csv.gz"])
def test_file_that_is_no_text_is_named_with_the_line_before(
    name: str, stream_file: Path, tmp_path: Path
) -> None:
    compressed = gzip.compress(stream_file.read_bytes())
    path = tmp_path / name
    path.write_bytes({"cut.csv.gz": compressed[:-100], "none.csv.gz": b"user,time"}.get(name, compressed))
    with pytest.raises(EventFileError, match=rf"{name}: not readable after line \d+"):
        list(events_of(path, Columns(keys=("user",), time="time")))


def test_command_says_what_is_wrong_on_one_line(tmp_path: Path) -> None:
    done = run("propose-ttl", tmp_path / "absent.csv", "--key", "user", "--time", "time")
    assert done.returncode == 1
    assert done.stderr == f"feature_eviction: {tmp_path / 'absent.csv'}: No such file or directory\n"
