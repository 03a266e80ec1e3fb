"""The client of benchmarks.freshness in a process of its own, so that publishing does not delay its clock.

python -m benchmarks.freshness_predict ADDRESS --rows N --batch N --rate N

Reads a number of seconds a line, asks the replica at the given pace for so long, and answers with one JSON
list: the milliseconds of each request. A request that is late does not wait for its place again, and the time
counts from when it was due, so that a replica that stands still is seen by all requests that it delays.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy.typing as npt
from msgspec.structs import replace

from benchmarks.freshness_writer import DIM
from benchmarks.train_step_stream import Stream, config_for
from param_server.client import ReplicaClient
from trainer.features import request_columns

REQUESTS = 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address")
    parser.add_argument("--rows", type=int, required=True, help="of the table")
    parser.add_argument("--batch", type=int, required=True, help="impressions a request")
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    options = parser.parse_args()
    config = config_for(dim=DIM, rows=options.rows, world_size=1, threads=1)
    config = replace(config, train=replace(config.train, batch_size=options.batch))
    batches = Stream(config, rank=0, world_size=1).batches(REQUESTS)
    requests = [request_columns(batch, config.schema) for batch in batches]
    with ReplicaClient(options.address) as client:
        client.predict(requests[0])
        for line in sys.stdin:
            sys.stdout.write(json.dumps(ask(client, requests, rate=options.rate, seconds=float(line))) + "\n")
            sys.stdout.flush()


def ask(
    client: ReplicaClient, requests: list[dict[str, npt.NDArray[Any]]], *, rate: float, seconds: float
) -> list[float]:
    """Milliseconds of each request, from when it was due."""
    taken_ms = []
    began_s = time.perf_counter()
    for number in range(max(1, int(rate * seconds))):
        due_s = began_s + number / rate
        time.sleep(max(0.0, due_s - time.perf_counter()))
        client.predict(requests[number % len(requests)])
        taken_ms.append(round(1e3 * (time.perf_counter() - due_s), 3))
    return taken_ms


if __name__ == "__main__":
    main()
