"""The fault campaign: any kill, the same model.

    python -m tests.chaos --kills 40 --seed 1
    python -m tests.chaos --seed 1 --scenario 'failpoints-serving#13' --keep DIR     replay one scenario

Real processes are killed, stopped, starved of disk and given damaged checkpoints until N SIGKILLs struck.
After every scenario: each impression was applied exactly once; the final checkpoint equals that of a run to
which nothing happened, bit for bit; shard and replicas hold what the trainer holds. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import Campaign, Options
from tests.chaos.processes import CampaignError
from tests.chaos.report import say
from tests.chaos.scenarios import replay


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=40, help="go on until so many SIGKILLs have struck")
    parser.add_argument("--seed", type=int, default=1, help="of the stream and of every fault")
    parser.add_argument(
        "--scenario", action="append", default=[], help="only this one: FAMILY or FAMILY#NUMBER; repeatable"
    )
    parser.add_argument("--kafka", action="store_true", help="every scenario on a real broker (KAFKA_HOME)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new directory and keep it")
    options = parser.parse_args(arguments)
    if options.kills < 1 or options.seed < 0:
        parser.error("--kills must be at least 1 and --seed at least 0")
    try:
        for name in options.scenario:
            replay(name, seed=options.seed)
    except ValueError as error:
        parser.error(str(error))
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep}: is not empty; name a new directory")
    directory = (options.keep or Path(tempfile.mkdtemp(prefix="freshet-chaos-"))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(
        Options(
            kills=options.kills,
            seed=options.seed,
            directory=directory,
            keep=options.keep is not None,
            scenario=tuple(options.scenario),
            kafka_everywhere=options.kafka,
        )
    )
    try:
        ok = campaign.run()
    except CampaignError as error:
        say(f"error: {error}")
        ok = False
    if ok and options.keep is None:
        shutil.rmtree(directory)
    elif not ok:
        say(f"kept: {directory}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
