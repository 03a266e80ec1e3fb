"""A comparison from its options to its table: data, planned runs, workers, what is printed and written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainer.compare import table
from trainer.compare.ablations import ABLATIONS, WHOLE
from trainer.compare.dataset import DataFacts, prepare
from trainer.compare.goals import Aim, ablation_lines, goal_lines
from trainer.compare.plan import TRUTH, RunSpec, Variant, runs_of
from trainer.compare.plot import draw
from trainer.compare.pool import Event, run_all
from trainer.compare.results import Results, of_other_code
from trainer.compare.run import RunResult
from trainer.compare.settings import Settings, base_config
from trainer.compare.summary import Summary, is_baseline, summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What the command line says."""

    settings: Settings
    variants: tuple[Variant, ...]
    num_workers: int
    out_dir: Path
    ablations: bool = False
    aim: Aim = "published_gain"


@dataclass(slots=True)
class _Plan:
    specs: list[RunSpec] = field(default_factory=list)
    facts: dict[int, DataFacts] = field(default_factory=dict)
    done: dict[str, RunResult] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def compare(options: CompareOptions) -> int:
    """Returns: the exit code; 1 if a run failed, whose model then misses that seed in the table.

    Raises: ConfigError, DataError.
    """
    results = Results(options.out_dir / "runs")
    console = Console(stderr=True)
    plan = _planned(options, results, console=console)
    _train(options, plan, results=results, console=console)
    summary = _summary(options, plan)
    lines = _lines(options, plan, summary)
    _write(options, summary, lines)
    out = Console(file=sys.stdout, width=table.WIDTH)
    table.print_table(summary, console=out)
    sys.stdout.write("\n".join(lines) + f"\nwritten to {options.out_dir}\n")
    for failure in plan.failures:
        sys.stderr.write(f"error: {failure}\n")
    return 1 if plan.failures else 0


def _planned(options: CompareOptions, results: Results, *, console: Console) -> _Plan:
    """Draw the data of every seed, and look which runs are done."""
    plan = _Plan()
    settings = options.settings
    for seed in range(1, settings.seeds + 1):
        path, facts = prepare(settings, seed=seed, folder=options.out_dir / "data")
        console.print(f"seed {seed}: {_said(facts)}", highlight=False, soft_wrap=True)
        plan.facts[seed] = facts
        for variant in options.variants:
            if variant.model == TRUTH and not facts.has_truth:
                continue
            plan.specs += runs_of(variant, seed=seed, settings=settings, data=path, facts=facts)
    for spec in plan.specs:
        found = results.finished(spec)
        if found is not None:
            plan.done[spec.name] = found
    return plan


def _said(facts: DataFacts) -> str:
    slices = ", ".join(f"{name} {num:,}" for name, num in facts.by_slice.items())
    return (
        f"{facts.kept:,} of {facts.drawn:,} impressions kept by the filter ({facts.users:,} users, "
        f"{facts.items:,} items): {slices}"
    )


def _train(options: CompareOptions, plan: _Plan, *, results: Results, console: Console) -> None:
    to_do = [spec for spec in plan.specs if spec.name not in plan.done]
    if plan.done:
        console.print(f"{len(plan.done)} of {len(plan.specs)} runs are done already", highlight=False)
    if not to_do:
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn("impressions,"), TimeElapsedColumn(), TextColumn("so far, left"), TimeRemainingColumn()),
    )
    left = {spec.name: _num_to_train(spec) for spec in to_do}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"runs 0/{len(to_do)}", total=sum(left.values()))
        num_ended = 0

        def hear(event: Event) -> None:
            nonlocal num_ended
            spec, message = event.spec, event.message
            if message.trained is not None:
                step = min(message.trained, left[spec.name])
            else:
                # Whatever the guess was, the run is over.
                step = left[spec.name]
                num_ended += 1
                if message.result is not None:
                    plan.done[spec.name] = message.result
                    results.save(spec, message.result)
                else:
                    plan.failures.append(message.error or f"{spec.name}: failed without a word")
                if not console.is_terminal:
                    _log(console, spec, message.result, ended=f"{num_ended}/{len(to_do)}")
            left[spec.name] -= step
            progress.update(bar, advance=step, description=f"runs {num_ended}/{len(to_do)}")

        run_all(to_do, num_workers=options.num_workers, hear=hear)


def _num_to_train(spec: RunSpec) -> int:
    by_slice = spec.facts.by_slice
    num = (
        sum(by_slice.values()) if spec.settings.mode == "online" else by_slice["train"] * spec.settings.epochs
    )
    if spec.variant.model == TRUTH:
        return 0
    return num if spec.domain is None else num // len(spec.facts.domains)


def _log(console: Console, spec: RunSpec, result: RunResult | None, *, ended: str) -> None:
    said = "failed" if result is None else f"{result.wall_s:.0f} s, {result.cost_us:.0f} us an impression"
    console.print(f"run {ended} {spec.name}: {said}", highlight=False, soft_wrap=True)


def _summary(options: CompareOptions, plan: _Plan) -> Summary:
    facts = next(iter(plan.facts.values()))
    tasks = tuple(base_config(options.settings, seed=1).schema.task_names)
    return summarise(
        [(spec, plan.done.get(spec.name)) for spec in plan.specs],
        domains=facts.domains,
        tasks=tasks,
        reference=WHOLE.name if options.ablations else None,
    )


def _lines(options: CompareOptions, plan: _Plan, summary: Summary) -> list[str]:
    """What is said below the table."""
    reference = WHOLE.name if options.ablations else "the best baseline"
    lines = [table.legend(summary, reference=reference)]
    lines += [f"note: {note}" for note in summary.notes]
    other = of_other_code(list(plan.done.values()))
    if other:
        lines.append(
            f"note: {len(other)} runs were made when the code that trains or judges was another "
            f"({other[0]}, ...); remove their files in {options.out_dir / 'runs'} to make them anew"
        )
    missing = [variant.name for variant in options.variants if summary.row(variant.name) is None]
    missing = [name for name in missing if name != TRUTH]
    if missing:
        lines.append(f"note: not in the table, as no seed of them is complete: {', '.join(missing)}")
    if options.ablations:
        return lines + ablation_lines(summary, must_lose=[one.name for one in ABLATIONS])
    return lines + goal_lines(summary, aim=options.aim)


def _write(options: CompareOptions, summary: Summary, lines: Sequence[str]) -> None:
    folder = options.out_dir
    texts = {
        "table.txt": table.to_text(summary) + "\n".join(lines) + "\n",
        "table.md": table.to_markdown(summary) + "\n".join(lines) + "\n",
        "table.tex": table.to_latex(summary),
        "cells.csv": table.to_csv(summary),
        "settings.json": msgspec.json.format(msgspec.json.encode(options.settings)).decode(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    draw(summary, folder / "gauc.svg")


def in_order(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """As papers print them: baselines, then PEPNet's family; the truth last."""
    return tuple(sorted(variants, key=lambda one: (one.model == TRUTH, not is_baseline(one))))
