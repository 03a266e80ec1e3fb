"""The command `rules simulate`: sets of rules side by side, over a file of updates or a synthetic stream."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from feature_eviction.argument_types import plot_path
from feature_eviction.keys import make_keys
from param_server.errors import RulesError
from param_server.rules_config import RULES_PRESETS, RulesConfig
from param_server.rules_simulation import Outcome, Setting, Updates, simulate
from proto.row_formats import ROW_FORMATS

UPDATES_MAX = 50_000_000
GAIN_DEFAULT = 0.1
"""What an update adds to its row's score where the file does not say: Paddle's worth of a show."""


def add_parser(commands: Any) -> None:
    rules = commands.add_parser("rules", help="what a set of synchronisation rules would send")
    actions = rules.add_subparsers(dest="action", required=True)
    parser = actions.add_parser("simulate", help="replay updates: bytes, staleness, held back, by rules")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--updates", type=Path, help="CSV with time (seconds), id and, if wanted, class, score"
    )
    source.add_argument(
        "--synthetic", type=int, metavar="N", help="so many updates with popular and rare ids"
    )
    parser.add_argument("--rules", action="append", required=True, help="a preset or a TOML file; repeatable")
    parser.add_argument("--dim", type=int, default=16, help="width of a row (default: %(default)s)")
    parser.add_argument(
        "--row-format",
        choices=ROW_FORMATS,
        default="float32",
        help="of rows on the wire (default: %(default)s)",
    )
    parser.add_argument(
        "--publish-every-s", type=int, default=1, help="seconds between passes (default: %(default)s)"
    )
    parser.add_argument(
        "--score-decay-per-day",
        type=float,
        default=0.02,
        help="share of a score lost in a day (default: %(default)s)",
    )
    parser.add_argument(
        "--ids", type=int, default=100_000, help="distinct ids of the synthetic stream (default: %(default)s)"
    )
    parser.add_argument("--rate", type=int, default=2_000, help="its updates a second (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic stream (default: %(default)s)")
    parser.add_argument("--plot", type=plot_path, help="a file that ends in .svg or .png")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Raises: RulesError for an unreadable file or unknown rules."""
    try:
        setting = Setting(
            dim=options.dim,
            row_format=options.row_format,
            publish_every_s=options.publish_every_s,
            score_decay_per_day=options.score_decay_per_day,
        )
    except ValueError as error:
        raise RulesError(str(error)) from error
    chosen = {name: load_rules(name) for name in options.rules}
    if options.updates is not None:
        updates = read_updates(options.updates)
    else:
        updates = synthetic_updates(
            options.synthetic, num_ids=options.ids, rate=options.rate, seed=options.seed
        )
    outcomes = {name: simulate(updates, rules=rules, setting=setting) for name, rules in chosen.items()}
    sys.stdout.write(report(outcomes))
    if options.plot is not None:
        plot(outcomes, options.plot)
        sys.stdout.write(f"plot: {options.plot}\n")


def load_rules(name: str) -> RulesConfig:
    """A preset by name, or a TOML file of RulesConfig."""
    if name in RULES_PRESETS:
        return RULES_PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise RulesError(f"'{name}' is no rules preset and no file; presets: {', '.join(RULES_PRESETS)}")
    try:
        return msgspec.toml.decode(path.read_bytes(), type=RulesConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RulesError(f"{path}: {error}") from error


def read_updates(path: Path) -> Updates:
    """The updates of a CSV file, put in the order of time.

    Raises: RulesError naming the file and the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            missing = {"time", "id"} - set(reader.fieldnames or ())
            if missing:
                raise RulesError(f"{path}: columns {sorted(missing)} are missing, found {reader.fieldnames}")
            lines = np.fromiter(
                _numbers(reader, path=path),
                dtype=[("time", "f8"), ("id", "i8"), ("class", "i4"), ("gain", "f4")],
            )
        except (UnicodeDecodeError, csv.Error) as error:
            raise RulesError(f"{path}: after line {reader.line_num}: {error}; it must be UTF-8") from error
    lines = lines[np.argsort(lines["time"], kind="stable")]
    keys_E = np.zeros(len(lines), np.int64)
    for class_id in np.unique(lines["class"]).tolist():
        chosen_E = lines["class"] == class_id
        keys_E[chosen_E], _ = make_keys(lines["id"][chosen_E], class_id=class_id)
    return Updates(times_s_E=lines["time"], keys_E=keys_E, gains_E=lines["gain"])


def _numbers(reader: csv.DictReader[str], *, path: Path) -> Iterator[tuple[float, int, int, float]]:
    for number, line in enumerate(reader, start=2):
        if number > UPDATES_MAX:
            raise RulesError(f"{path}: more than {UPDATES_MAX} updates; cut the file")
        try:
            values = (
                float(line["time"]),
                int(line["id"]),
                int(line.get("class") or 0),
                float(line.get("score") or GAIN_DEFAULT),
            )
        except (TypeError, ValueError) as error:
            raise RulesError(f"{path}: line {number}: {error}") from error
        if not (0 <= values[0] < 2**40 and -(2**63) <= values[1] < 2**63 and 0 <= values[2] <= 4095):
            raise RulesError(f"{path}: line {number}: time, id or class is out of range: {values[:3]}")
        yield values


def synthetic_updates(num_updates: int, *, num_ids: int, rate: int, seed: int) -> Updates:
    """Ids whose popularity falls with their rank; one update in ten is a positive, worth 1."""
    if num_updates < 1 or not 1 <= num_ids < 2**40 or rate < 1:
        raise RulesError(
            f"--synthetic, --ids and --rate must be at least 1, found {num_updates}, {num_ids}, {rate}"
        )
    if seed < 0:
        raise RulesError(f"--seed must not be negative, found {seed}")
    if num_updates > UPDATES_MAX:
        raise RulesError(f"--synthetic: at most {UPDATES_MAX} updates, found {num_updates}")
    rng = np.random.default_rng(seed)
    ids_E = np.exp(rng.random(num_updates) * np.log(num_ids)).astype(np.int64) - 1
    keys_E, _ = make_keys(ids_E, class_id=4)
    gains_E: npt.NDArray[np.float32] = np.where(rng.random(num_updates) < 0.1, 1.0, GAIN_DEFAULT)
    return Updates(
        times_s_E=1_000_000 + np.arange(num_updates) / rate, keys_E=keys_E, gains_E=gains_E.astype(np.float32)
    )


def report(outcomes: dict[str, Outcome]) -> str:
    """A table, one line a set of rules; the first line is what they are measured against."""
    first = next(iter(outcomes.values()))
    lines = [
        f"{first.num_updates} updates, {first.num_passes} passes. Every touched row, float32, every pass: "
        f"{first.bytes_everything} bytes.",
        f"{'rules':<24}{'bytes':>14}{'fewer':>8}{'rows':>11}{'pending':>9}  stale s p50/p99/max  held back",
    ]
    for name, one in outcomes.items():
        stale = "/".join(str(one.staleness_s(quantile)) for quantile in (0.5, 0.99, 1.0))
        held = ", ".join(f"{reason} {num}" for reason, num in sorted(one.held_back.items())) or "none"
        lines.append(
            f"{Path(name).name[:23]:<24}{one.bytes_sent:>14}{one.times_fewer_bytes:>7.1f}x"
            f"{one.num_pushed:>11}{one.num_pending:>9}  {stale:<19}  {held}"
        )
    return "\n".join(lines) + "\n"


def plot(outcomes: dict[str, Outcome], path: Path) -> None:
    """The share of updates that met a row at most so stale, a line a set of rules."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, one in outcomes.items():
        shares_S = np.cumsum(one.staleness_S) / max(1, int(one.staleness_S.sum()))
        axes.step(
            np.arange(len(shares_S)),
            shares_S,
            where="post",
            label=f"{Path(name).name}: {one.times_fewer_bytes:.1f}x fewer bytes",
        )
    axes.set_xscale("symlog")
    axes.set_xlabel("seconds since the oldest update that serving lacks")
    axes.set_ylabel("share of updates")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
