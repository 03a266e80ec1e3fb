"""The simulation: log, rules, publishing, shards and replicas under one clock, one seed each.

    python -m tests.simulation --seeds 200
    python -m tests.simulation --seeds 1 --first-seed 4711 --events     replay one, show its last events

Nothing here sleeps or opens a socket: a virtual clock, a network that loses, doubles, delays and cuts off,
and a disk that tears, rots and fills up. After every step each promise is checked against a model.
Exit code 1 if one broke.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.runner import Totals, simulate_many

PROGRESS_SEEDS = 1000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--events", action="store_true", help="show the last events of every seed")
    parser.add_argument(
        "--go-on", action="store_true", help="do not stop at the first seed that breaks a promise"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.first_seed < 0:
        parser.error("--seeds must be at least 1 and --first-seed at least 0")
    begun_s = time.monotonic()
    totals = Totals()
    for outcome in simulate_many(options.first_seed, options.seeds):
        totals.add(outcome)
        if outcome.violation:
            say(f"{outcome.report()}\n")
        elif options.events:
            say("\n".join(outcome.recent))
        if outcome.violation and not options.go_on:
            break
        if totals.num_seeds % PROGRESS_SEEDS == 0:
            say(f"{totals.num_seeds} seeds, {totals.num_broken} broke a promise")
    seconds = time.monotonic() - begun_s
    for name, num in sorted(totals.counts.items()):
        say(f"{name:>32} {num:>12,}")
    say(
        f"{totals.num_seeds} seeds from {options.first_seed}, {totals.num_broken} broke a promise, "
        f"{seconds:.1f} s, {totals.num_seeds / seconds:.1f} seeds/s"
    )
    say(f"digest {totals.digest}")
    return 1 if totals.num_broken else 0


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
