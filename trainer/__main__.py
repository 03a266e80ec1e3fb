"""The command line: `python -m trainer {run,train,produce,broker,config,calibration,checkpoints,compare}`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import structlog
from msgspec.structs import replace

from feature_eviction import FeatureEvictionError
from feature_eviction.argument_types import at_least
from param_server.client import ClientSecurity, ParamServerError
from trainer.checkpoint_commands import add_commands
from trainer.compare.command import add_command as add_compare
from trainer.config import Config, load_config, preset, to_toml
from trainer.config.optimizers import optimizer
from trainer.config.reference import reference
from trainer.errors import ConfigError, FreshetError
from trainer.failpoints import arm_from_environment
from trainer.stream.broker import security_from_environment

SHARD_TOKEN_VARIABLE = "FRESHET_SHARD_TOKEN"
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(arguments: list[str] | None = None) -> int:
    """Returns: the exit code; an operator's error is one line on stderr and exit code 1, Ctrl-C is 130."""
    options = _parser().parse_args(arguments)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer(colors=False),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        arm_from_environment(os.environ)
        command = options.command
        code: int = command(options)
        return code
    except (FreshetError, ParamServerError, FeatureEvictionError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)

    train = commands.add_parser("train", help="one trainer process (or each rank, under torchrun)")
    train.add_argument("--config", type=Path, required=True, help="TOML; `trainer config` prints one")
    train.add_argument("--run-dir", type=Path, required=True, help="checkpoints, status, traces")
    train.add_argument(
        "--shard-address", help="host:port[,...] of the shards instead of the file's; '' = none"
    )
    _add_auto_rollback(train)
    train.add_argument("--bootstrap-servers", help="Kafka's host:port[,...] instead of the file's")
    train.set_defaults(command=_train)

    produce = commands.add_parser("produce", help="put impressions into the topic")
    produce.add_argument("--config", type=Path, required=True, help="TOML; `trainer config` prints one")
    produce.add_argument("--run-dir", type=Path, required=True, help="status and counters of what was sent")
    produce.add_argument("--bootstrap-servers", help="Kafka's host:port[,...] instead of the file's")
    produce.add_argument("--impressions", type=at_least(1), help="stop after this many")
    produce.add_argument(
        "--data", type=Path, help="KuaiRand file or directory instead of the synthetic stream"
    )
    produce.add_argument("--embedded", action="store_true", help="keep within the embedded broker's memory")
    produce.set_defaults(command=_produce)

    broker = commands.add_parser("broker", help="an in-memory Kafka broker for trying things out")
    broker.add_argument("--config", type=Path, help="a TOML file whose topics to make (default: quickstart)")
    broker.add_argument("--ready-file", type=Path, help="gets the address as JSON; stdout names it anyway")
    broker.set_defaults(command=_broker)

    config = commands.add_parser("config", help="print a preset as TOML, or what every key means")
    what = config.add_mutually_exclusive_group()
    what.add_argument("--preset", default="quickstart", help="by name (default: %(default)s)")
    what.add_argument("--reference", action="store_true", help="print docs/configuration.md instead")
    config.add_argument(
        "--optimizer", help="a pair of optimizers by name: online (default), production, adam"
    )
    config.set_defaults(command=_config)

    calibration = commands.add_parser(
        "calibration", help="the synthetic stream beside PEPNet's Table 1, and what can be learned of it"
    )
    calibration.add_argument("--preset", default="quickstart", help="whose stream (default: %(default)s)")
    calibration.add_argument("--impressions", type=at_least(1), help="of the stream (default: the preset's)")
    calibration.add_argument("--seed", type=int, help="of the stream (default: the preset's)")
    calibration.add_argument("--json", action="store_true", help="the figures as JSON")
    calibration.set_defaults(command=_calibration)

    add_commands(commands)
    add_compare(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser("run", help="the whole path on one machine")
    which = run.add_mutually_exclusive_group()
    which.add_argument("--preset", help="default: quickstart, or kuairand with --data")
    which.add_argument("--config", type=Path, help="a TOML file instead of a preset")
    run.add_argument("--impressions", type=at_least(1), help="stop after this many (default: the preset's)")
    run.add_argument("--seconds", type=_positive_seconds, help="stop producing after this long")
    run.add_argument("--rate", type=at_least(1), help="impressions a second to produce")
    run.add_argument("--data", type=Path, help="KuaiRand file or directory instead of the synthetic stream")
    run.add_argument(
        "--out",
        "--run-dir",
        type=Path,
        default=Path("freshet-run"),
        help="run directory (default: %(default)s)",
    )
    run.add_argument("--bootstrap-servers", help="a real Kafka instead of the embedded broker")
    run.add_argument(
        "--order", choices=("strict", "loose"), help="kafka.order instead of the configuration's"
    )
    run.add_argument(
        "--ranks",
        type=at_least(1),
        default=1,
        help="trainer processes (torchrun when above 1; default: %(default)s)",
    )
    run.add_argument("--seed", type=int, help="of stream and model (default: the configuration's)")
    run.add_argument("--resume", action="store_true", help="go on in an earlier run's directory")
    _add_auto_rollback(run)
    run.add_argument("--live", action=argparse.BooleanOptionalAction, help="live terminal view")
    run.set_defaults(command=_run)


def _add_auto_rollback(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--auto-rollback",
        action="store_true",
        help="when the quality gate holds a version, publish the last good one again",
    )


def _positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, found {text}")
    return value


def _run(options: argparse.Namespace) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "run: starts every process itself, torchrun included; call it without torchrun, with --ranks N. "
            "Under torchrun, `train` is the command of one rank"
        )
    from trainer.run.run_all import RunOptions, run_all

    return run_all(
        _chosen_config(options),
        RunOptions(
            out_dir=options.out,
            impressions=options.impressions,
            seconds=options.seconds,
            data=options.data,
            bootstrap_servers=options.bootstrap_servers,
            resume=options.resume,
            live=options.live,
            num_ranks=options.ranks,
        ),
    )


def _chosen_config(options: argparse.Namespace) -> Config:
    if options.config is not None:
        config = load_config(options.config)
    else:
        config = preset(options.preset or ("kuairand" if options.data else "quickstart"))
    config = _with_seed(config, options.seed)
    if options.bootstrap_servers is not None:
        config = _with_servers(config, options.bootstrap_servers)
        _check_no_port_0("--bootstrap-servers", options.bootstrap_servers)
    if options.rate is not None:
        config = replace(config, produce=replace(config.produce, impressions_per_s=options.rate))
    if options.order is not None:
        config = replace(config, kafka=replace(config.kafka, order=options.order))
    return _with_auto_rollback(config, options.auto_rollback)


def _with_seed(config: Config, seed: int | None) -> Config:
    if seed is None:
        return config
    try:
        return replace(config, seed=seed)
    except ValueError as error:
        raise ConfigError(f"--seed: {error}") from error


def _with_servers(config: Config, servers: str | None) -> Config:
    if servers is None:
        return config
    try:
        return replace(config, kafka=replace(config.kafka, bootstrap_servers=servers))
    except ValueError as error:
        raise ConfigError(f"--bootstrap-servers: {error}") from error


def _with_shard(config: Config, address: str | None) -> Config:
    if address is None:
        return config
    try:
        num_shards = address.count(",") + 1
        serving = replace(config.serving, shard_address=address, num_shards=num_shards)
        return replace(config, serving=serving)
    except ValueError as error:
        raise ConfigError(f"--shard-address: {error}") from error


def _with_auto_rollback(config: Config, wanted: bool) -> Config:
    if not wanted:
        return config
    try:
        return replace(config, publish=replace(config.publish, auto_rollback=True))
    except ValueError as error:
        raise ConfigError(f"--auto-rollback: {error}") from error


def _shard_security(config: Config, environ: Mapping[str, str]) -> ClientSecurity:
    """The trainer's certificate from the file, its token from the environment."""
    serving = config.serving
    try:
        return ClientSecurity(
            ca_file=serving.tls_ca_file,
            cert_file=serving.tls_cert_file,
            key_file=serving.tls_key_file,
            token=environ.get(SHARD_TOKEN_VARIABLE, "").strip(),
        )
    except ValueError as error:
        raise ConfigError(f"serving.tls_*, {SHARD_TOKEN_VARIABLE}: {error}") from error


def _check_no_port_0(name: str, addresses: str) -> None:
    """Port 0 means "any free one" to who listens; nobody can be called there."""
    for address in addresses.split(","):
        host, _, port = address.strip().rpartition(":")
        if host and int(port) == 0:
            raise ConfigError(f"{name}: '{address.strip()}' has port 0; name the port that is listened at")


def _train(options: argparse.Namespace) -> int:
    config = _with_servers(load_config(options.config), options.bootstrap_servers)
    config = _with_auto_rollback(_with_shard(config, options.shard_address), options.auto_rollback)
    _check_no_port_0("kafka.bootstrap_servers (--bootstrap-servers)", config.kafka.bootstrap_servers)
    _check_no_port_0("serving.shard_address (--shard-address)", config.serving.shard_address)
    # Only now: torch takes long to import, and a wrong address needs none of it.
    from trainer.worker import run_worker

    run_worker(
        config,
        run_dir=options.run_dir,
        security=security_from_environment(os.environ),
        shard_security=_shard_security(config, os.environ),
    )
    return 0


def _produce(options: argparse.Namespace) -> int:
    from trainer.data import impression_source
    from trainer.stream.producer import run_producer

    config = _with_servers(load_config(options.config), options.bootstrap_servers)
    _check_no_port_0("kafka.bootstrap_servers (--bootstrap-servers)", config.kafka.bootstrap_servers)
    status_file = options.run_dir / "status" / "producer.json"
    status_file.parent.mkdir(parents=True, exist_ok=True)
    run_producer(
        config,
        source=impression_source(config, data=options.data),
        status_file=status_file,
        impressions=options.impressions or 0,
        rate=config.produce.impressions_per_s,
        embedded=options.embedded,
        security=security_from_environment(os.environ),
    )
    return 0


def _broker(options: argparse.Namespace) -> int:
    from trainer.stream.embedded_broker import run_embedded_broker

    config = load_config(options.config) if options.config is not None else preset("quickstart")
    kafka = config.kafka
    run_embedded_broker(
        topics={kafka.topic: kafka.num_partitions, kafka.dead_letter_topic: 1},
        ready_file=options.ready_file,
    )
    return 0


def _config(options: argparse.Namespace) -> int:
    if options.reference:
        if options.optimizer is not None:
            raise ConfigError("--reference prints defaults, whatever the --optimizer; leave one of them out")
        sys.stdout.write(reference())
        return 0
    config = preset(options.preset)
    if options.optimizer is not None:
        config = replace(config, optimizer=optimizer(options.optimizer))
    sys.stdout.write(to_toml(config))
    return 0


def _calibration(options: argparse.Namespace) -> int:
    from trainer.data.calibration import as_json, measure
    from trainer.data.calibration_report import report

    config = preset(options.preset)
    if options.impressions is not None:
        config = replace(config, impressions=options.impressions)
    found = measure(_with_seed(config, options.seed))
    sys.stdout.write(json.dumps(as_json(found), indent=2) + "\n" if options.json else report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
