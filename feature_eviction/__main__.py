"""python -m feature_eviction: propose-ttl and dry-run, over a CSV file of sightings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from feature_eviction.argument_types import plot_path
from feature_eviction.dry_run import Point, dry_run, plot
from feature_eviction.errors import FeatureEvictionError
from feature_eviction.event_file import Columns, events_of
from feature_eviction.policy import ClassPolicy, ScoreConfig, TablePolicy
from feature_eviction.propose_ttl import QUANTILE, Proposal, propose_ttls


def main(arguments: list[str] | None = None) -> int:
    """0 = done, 1 = something was wrong with what was asked."""
    options = _parser().parse_args(arguments)
    try:
        columns = Columns(
            keys=tuple(options.key), time=options.time, label=options.label, time_is_ms=options.time_ms
        )
        if options.command == "propose-ttl":
            proposals = propose_ttls(
                events_of(options.file, columns), num_classes=len(options.key), quantile=options.quantile
            )
            sys.stdout.write(_ttl_report(proposals, columns))
            return 0
        run = dry_run(_policy(options), events_of(options.file, columns))
        if not run.points:
            raise FeatureEvictionError(f"{options.file} holds no sightings")
        sys.stdout.write(_dry_run_report(run.points[-1], run.table.bytes_used))
        for key in options.why:
            sys.stdout.write(f"{run.table.why(key)}\n")
        if options.plot is not None:
            plot(run, options.plot)
            sys.stdout.write(f"plot            {options.plot}\n")
    except OSError as error:
        sys.stderr.write(f"feature_eviction: {error.filename or options.file}: {error.strerror or error}\n")
        return 1
    except (FeatureEvictionError, ValueError, msgspec.ValidationError) as error:
        sys.stderr.write(f"feature_eviction: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m feature_eviction", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ttl = commands.add_parser("propose-ttl", help="a lifetime for each key column from the gaps of its ids")
    ttl.add_argument(
        "--quantile",
        type=float,
        default=QUANTILE,
        help="of an id's gaps that its lifetime must cover (default: %(default)s)",
    )
    dry = commands.add_parser("dry-run", help="what a policy and budget would have evicted")
    dry.add_argument("--num-slots", type=int, required=True)
    dry.add_argument(
        "--score", default="kraken", help="a shipped score or module:function (default: %(default)s)"
    )
    dry.add_argument(
        "--policy", type=Path, help="a TablePolicy as TOML or JSON, instead of --score and --ttl-s"
    )
    dry.add_argument("--ttl-s", type=int, help="one lifetime for all key columns")
    dry.add_argument("--plot", type=plot_path, help="a file that ends in .svg or .png")
    dry.add_argument("--why", type=int, action="append", default=[], help="explain a key (class << 52 | id)")
    for command in (ttl, dry):
        command.add_argument("file", type=Path, metavar="FILE.csv[.gz]")
        command.add_argument("--key", action="append", required=True, help="an id column; each is one class")
        command.add_argument("--time", required=True, help="the column of unix seconds")
        command.add_argument("--time-ms", action="store_true", help="that column is in milliseconds")
        command.add_argument("--label", help="the column that is above 0 for a positive")
    return parser


def _policy(options: argparse.Namespace) -> TablePolicy:
    """--policy with its num_slots replaced, or the score and lifetime given."""
    if options.policy is not None:
        decode = msgspec.json.decode if options.policy.suffix == ".json" else msgspec.toml.decode
        given = decode(options.policy.read_bytes(), type=TablePolicy)
        return msgspec.structs.replace(given, num_slots=options.num_slots)
    classes = [ClassPolicy(class_id=number, ttl_s=options.ttl_s) for number in range(len(options.key))]
    return TablePolicy(
        num_slots=options.num_slots, score=ScoreConfig(kind=options.score), classes=tuple(classes)
    )


def _ttl_report(proposals: list[Proposal], columns: Columns) -> str:
    lines = [f"{'column':<20}{'class':>6}{'ids':>12}{'gaps':>12}{'ttl_s':>12}{'days':>9}{'cut':>9}"]
    for one in proposals:
        ttl = "-" if one.ttl_s is None else str(one.ttl_s)
        days = "-" if one.ttl_s is None else f"{one.ttl_s / 86_400:.2f}"
        lines.append(
            f"{columns.keys[one.class_id]:<20}{one.class_id:>6}{one.num_ids:>12}{one.num_gaps:>12}{ttl:>12}"
            f"{days:>9}{one.share_longer:>9.3%}"
        )
    return "\n".join(lines) + "\n"


def _dry_run_report(last: Point, bytes_used: int) -> str:
    evicted = ", ".join(f"{reason} {count}" for reason, count in last.evicted.items() if count) or "none"
    refused = ", ".join(f"{reason} {count}" for reason, count in last.refused.items() if count) or "none"
    return (
        f"sightings       {last.sightings}\n"
        f"hit rate        {last.hits / max(1, last.sightings):.4f}\n"
        f"rows held       {last.rows}\n"
        f"evicted         {evicted}\n"
        f"came back       {last.re_entries}\n"
        f"refused         {refused}\n"
        f"id table bytes  {bytes_used}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
