"""`python -m trainer checkpoints {list,verify,diff,export,import}`: looking at checkpoints, and moving them.

All but import only read, and may be used beside a running trainer.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import load_config
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from trainer.checkpoint.folders import Folder
    from trainer.checkpoint.restore import SavedState
    from trainer.checkpoint.store import Store

DIR_HELP = "checkpoint directory: a local path or any fsspec address"
STEP_HELP = "its step, or its folder's name"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoints = commands.add_parser("checkpoints", help="look at checkpoints, export and import them")
    kinds = checkpoints.add_subparsers(required=True, metavar="WHAT")

    listing = kinds.add_parser("list", help="what is there")
    listing.add_argument("directory", metavar="DIR", help=DIR_HELP)
    listing.set_defaults(command=_list)

    verify = kinds.add_parser("verify", help="read every byte and check it; exit code 1 if one is damaged")
    verify.add_argument("directory", metavar="DIR", help=DIR_HELP)
    verify.add_argument("step", metavar="STEP", nargs="?", help=f"{STEP_HELP}; all without it")
    verify.set_defaults(command=_verify)

    diff = kinds.add_parser("diff", help="what changed from A to B")
    diff.add_argument("directory", metavar="DIR", help=DIR_HELP)
    diff.add_argument("first", metavar="A", help=STEP_HELP)
    diff.add_argument("second", metavar="B", help=STEP_HELP)
    diff.set_defaults(command=_diff)

    export = kinds.add_parser("export", help="as plain safetensors and one JSON, for a batch trainer")
    export.add_argument("directory", metavar="DIR", help=DIR_HELP)
    export.add_argument("out", metavar="OUT", help="a new folder, local or an fsspec address")
    export.add_argument("--step", help=f"{STEP_HELP}; the newest without it")
    export.add_argument("--config", type=Path, help="the run's: export.json then says what the ids mean")
    export.set_defaults(command=_export)

    importing = kinds.add_parser("import", help="make a first checkpoint from such files")
    importing.add_argument("source", metavar="IN", help="the folder with export.json")
    importing.add_argument("directory", metavar="DIR", help=DIR_HELP)
    importing.add_argument("--config", type=Path, required=True, help="what the run will be started with")
    importing.set_defaults(command=_import)


def _list(options: argparse.Namespace) -> int:
    from trainer.checkpoint.folders import list_folders, read_manifest
    from trainer.checkpoint.store import open_store

    store = open_store(options.directory)
    listing = list_folders(store)
    if not any(listing):
        raise CheckpointError(f"{store.root}: holds no checkpoints")
    _say(f"{'step':>12}  {'saved (UTC)':19}  {'MB':>10}  {'ranks':>5}  {'version':>8}  folder")
    for folder in listing.committed:
        try:
            manifest = read_manifest(store, folder)
        except CheckpointError as error:
            _say(f"{folder.step:>12}  damaged: {error}")
            continue
        saved = datetime.fromtimestamp(manifest.created_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        ranks = manifest.world_size or "-"
        megabytes = f"{manifest.num_bytes / 1e6:.1f}"
        version = manifest.published or "-"
        _say(f"{folder.step:>12}  {saved}  {megabytes:>10}  {ranks:>5}  {version:>8}  {folder}")
    for folder in listing.unfinished:
        _say(f"{folder.step:>12}  unfinished: on its way, or what a killed run left: {folder}")
    for name in listing.set_aside:
        _say(f"{'-':>12}  set aside as damaged: {name}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from trainer.checkpoint.folders import list_folders, verify
    from trainer.checkpoint.store import open_store

    store = open_store(options.directory)
    folders = list_folders(store).committed
    if options.step is not None:
        folders = [_folder(store, options.step)]
    if not folders:
        raise CheckpointError(f"{store.root}: holds no checkpoints")
    damages = []
    for folder in folders:
        try:
            manifest = verify(store, folder)
        except CheckpointError as error:
            damages.append(str(error))
            _say(f"{folder}: damaged")
        else:
            _say(f"{folder}: whole, {len(manifest.files)} files, {manifest.num_bytes / 1e6:.1f} MB")
    if damages:
        raise CheckpointError(
            f"{len(damages)} of {len(folders)} checkpoints are damaged: {'; '.join(damages)}"
        )
    return 0


def _diff(options: argparse.Namespace) -> int:
    from trainer.checkpoint.compare import diff_dense, diff_numbers, diff_tables
    from trainer.checkpoint.store import open_store

    store = open_store(options.directory)
    first, second = _saved(store, options.first), _saved(store, options.second)
    for table in diff_tables(first, second):
        _say(
            f"table {table.table}: {table.added} rows added, {table.removed} removed, "
            f"{table.changed} changed, {table.same} the same; largest difference {table.largest_difference:g}"
        )
    changed, num = diff_dense(first, second)
    _say(f"dense: {len(changed)} of {num} parameters changed")
    for one in changed:
        gap = (
            "other shape, or only in one" if one.largest_difference is None else f"{one.largest_difference:g}"
        )
        _say(f"  {one.name}: {gap}")
    for what, before, after in diff_numbers(first, second):
        _say(f"{what}: {before} -> {after}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from trainer.checkpoint.export import export_checkpoint
    from trainer.checkpoint.store import open_store

    schema = load_config(options.config).schema if options.config is not None else None
    saved = _saved(open_store(options.directory), options.step)
    out = open_store(options.out)
    description = export_checkpoint(saved, out, schema=schema)
    for name, table in description.tables.items():
        _say(f"table {name}: {table.num_rows} rows of dim {table.dim} in {len(table.files)} files")
    _say(f"step {description.step} exported to {out.root}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from trainer.checkpoint.store import open_store
    from trainer.checkpoint.warm_start import import_checkpoint

    config = load_config(options.config)
    target = open_store(options.directory)
    folder = import_checkpoint(
        open_store(options.source), target, config=config, now_ms=time.time_ns() // 1_000_000
    )
    _say(f"imported as {target.root}/{folder}; a run with this checkpoint directory begins with it")
    return 0


def _folder(store: Store, text: str | None) -> Folder:
    """The newest committed checkpoint of a step, or the one with this name; without a text the newest.

    Raises: CheckpointError naming what there is.
    """
    from trainer.checkpoint.folders import list_folders

    committed = list_folders(store).committed
    found = [one for one in committed if text in (None, str(one), str(one.step))]
    if not found:
        steps = ", ".join(str(one.step) for one in committed[-10:])
        raise CheckpointError(
            f"{store.root}: holds no checkpoint{'' if text is None else f' {text}'}"
            + (f"; the newest steps are {steps}" if steps else "")
        )
    return found[-1]


def _saved(store: Store, text: str | None) -> SavedState:
    """Its files are checked one by one as they are read."""
    from trainer.checkpoint.folders import read_manifest
    from trainer.checkpoint.restore import SavedState

    folder = _folder(store, text)
    return SavedState(store, folder, read_manifest(store, folder))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
