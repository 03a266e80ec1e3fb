"""The synthetic stream measured: beside PEPNet's Table 1, what the best model reaches, and its conflicts.

`python -m trainer calibration` prints it. Rates are means of the true probabilities. The best AUC and GAUC
are those of the true probability itself, judged by the labels drawn from it: no model can be expected to be
better. The seesaw is measured where GAUC looks, in the order of items for one user: correlations of true
logits over items, between tasks in one domain and between domains for one task.

Shapes: N impressions, D domains, T tasks (both of the schema), M rows of one domain, P probes: U users by I
items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config import Config
from trainer.data import table1
from trainer.data.synthetic import SyntheticStream
from trainer.metrics import auc, gauc

Floats = npt.NDArray[np.float64]

PROBE_USERS = 64
PROBE_ITEMS = 256

Overlaps = dict[tuple[int, int], float]
"""(index of a domain, index of another one) -> share of the first one's users or items that both have."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """One pass over a stream; everything in the schema's order."""

    preset: str
    seed: int
    impressions: int
    domains: tuple[str, ...]
    tasks: tuple[str, ...]
    shares_D: Floats
    rates_DT: Floats
    table_shares_D: Floats
    """Of the schema's domains alone; their sum is 1."""
    table_rates_DT: Floats
    best_auc_DT: Floats
    """NaN where a domain has no positives or no negatives."""
    best_gauc_DT: Floats
    positives_DT: npt.NDArray[np.int64]
    user_overlaps: Overlaps
    item_overlaps: Overlaps
    """Of the population, from which the stream draws."""
    shown_user_overlaps: Overlaps
    shown_item_overlaps: Overlaps
    """Of the ids that this stream showed; NaN where a domain showed none."""
    table_user_overlaps: Overlaps
    table_item_overlaps: Overlaps
    task_correlation_TT: Floats
    """Mean over domains."""
    domain_correlation_DD: Floats
    """Mean over tasks."""
    num_distinct: dict[str, int]
    """Distinct ids that the stream showed, by feature."""


def measure(config: Config) -> Calibration:
    """Read the whole stream. Raises: ConfigError as SyntheticStream does."""
    stream = SyntheticStream(config)
    truths, labels, domains, users, items = [], [], [], [], []
    distinct: dict[str, npt.NDArray[np.int64]] = {}
    for impressions, truth_NT in stream.batches(65_536):
        truths.append(truth_NT)
        labels.append(impressions.labels_NT)
        domains.append(impressions.domain_N)
        users.append(impressions.user_ids_N)
        items.append(impressions.sparse["item_id"].ids_L)
        for name, jagged in impressions.sparse.items():
            distinct[name] = np.union1d(distinct.get(name, jagged.ids_L), jagged.ids_L)
    truth_NT, labels_NT = np.concatenate(truths), np.concatenate(labels)
    domain_N, users_N = np.concatenate(domains), np.concatenate(users)
    items_N = np.concatenate(items)
    num_domains, num_tasks = len(config.schema.domains), len(config.schema.tasks)
    best_auc_DT, best_gauc_DT = np.full((2, num_domains, num_tasks), np.nan)
    rates_DT = np.full((num_domains, num_tasks), np.nan)
    positives_DT = np.zeros((num_domains, num_tasks), np.int64)
    for domain in np.unique(domain_N):
        row_M = domain_N == domain
        rates_DT[domain] = truth_NT[row_M].mean(axis=0)
        positives_DT[domain] = labels_NT[row_M].sum(axis=0)
        for task in range(num_tasks):
            truth_M, labels_M = truth_NT[row_M, task], labels_NT[row_M, task]
            best_auc_DT[domain, task] = _or_nan(auc(truth_M, labels_M))
            best_gauc_DT[domain, task] = _or_nan(gauc(truth_M, labels_M, users_N[row_M]))
    table_domains = [table1.DOMAINS.index(name) for name in config.schema.domains]
    table_tasks = [table1.TASKS.index(name) for name in config.schema.task_names]
    table_shares_D = table1.domain_shares()[table_domains]
    task_correlation_TT, domain_correlation_DD = _seesaw(stream)
    return Calibration(
        preset=config.preset,
        seed=config.seed,
        impressions=len(domain_N),
        domains=config.schema.domains,
        tasks=tuple(config.schema.task_names),
        shares_D=np.bincount(domain_N, minlength=num_domains) / len(domain_N),
        rates_DT=rates_DT,
        table_shares_D=table_shares_D / table_shares_D.sum(),
        table_rates_DT=table1.RATES_DT[np.ix_(table_domains, table_tasks)],
        best_auc_DT=best_auc_DT,
        best_gauc_DT=best_gauc_DT,
        positives_DT=positives_DT,
        user_overlaps=_overlaps(stream.users.regions_U, table_domains),
        item_overlaps=_overlaps(stream.items.regions_I, table_domains),
        shown_user_overlaps=_shown_overlaps(users_N, domain_N, table_domains),
        shown_item_overlaps=_shown_overlaps(items_N, domain_N, table_domains),
        table_user_overlaps=_of_schema(table1.USER_OVERLAPS, table_domains),
        table_item_overlaps=_of_schema(table1.ITEM_OVERLAPS, table_domains),
        task_correlation_TT=task_correlation_TT,
        domain_correlation_DD=domain_correlation_DD,
        num_distinct={name: len(ids) for name, ids in distinct.items()},
    )


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _overlaps(regions: npt.NDArray[np.uint8], table_domains: list[int]) -> Overlaps:
    whole = {}
    for a, b in table1.USER_OVERLAPS:
        in_a = regions >> a & 1 > 0
        whole[a, b] = float((regions[in_a] >> b & 1 > 0).mean())
    return _of_schema(whole, table_domains)


def _shown_overlaps(
    ids_N: npt.NDArray[np.int64], domain_N: npt.NDArray[np.uint8], table_domains: list[int]
) -> Overlaps:
    shown = {index: np.unique(ids_N[domain_N == index]) for index in range(len(table_domains))}
    return {
        (a, b): float(np.isin(shown[a], shown[b]).mean()) if len(shown[a]) else np.nan
        for a, b in _of_schema(table1.USER_OVERLAPS, table_domains)
    }


def _of_schema(overlaps: Overlaps, table_domains: list[int]) -> Overlaps:
    """By the schema's indices, where it has both domains."""
    return {
        (table_domains.index(a), table_domains.index(b)): share
        for (a, b), share in overlaps.items()
        if a in table_domains and b in table_domains
    }


def _seesaw(stream: SyntheticStream) -> tuple[Floats, Floats]:
    """([T, T], [D, D]) correlations over the items that one user could be shown, pooled over users."""
    logits_DUIT = stream.probe(num_users=PROBE_USERS, num_items=PROBE_ITEMS).astype(np.float64)
    logits_DUIT -= logits_DUIT.mean(axis=2, keepdims=True)
    logits_DPT = logits_DUIT.reshape(len(logits_DUIT), -1, logits_DUIT.shape[3])
    logits_DPT /= np.sqrt((logits_DPT**2).mean(axis=1, keepdims=True))
    num_domains, num_probes, num_tasks = logits_DPT.shape
    task_TT = np.einsum("dpt,dps->ts", logits_DPT, logits_DPT) / (num_probes * num_domains)
    domain_DD = np.einsum("dpt,ept->de", logits_DPT, logits_DPT) / (num_probes * num_tasks)
    return task_TT, domain_DD


def as_json(found: Calibration) -> dict[str, Any]:
    """Plain values by name; None where a quality is not defined."""

    def by_cell(values_DT: npt.NDArray[Any]) -> dict[str, dict[str, Any]]:
        return {
            domain: dict(zip(found.tasks, map(_plain, values_T), strict=True))
            for domain, values_T in zip(found.domains, values_DT, strict=True)
        }

    def by_pair(overlaps: Overlaps) -> dict[str, float | None]:
        return {
            f"{found.domains[a]} in {found.domains[b]}": None if np.isnan(share) else share
            for (a, b), share in overlaps.items()
        }

    def square(names: tuple[str, ...], values: Floats) -> dict[str, dict[str, Any]]:
        return {
            name: dict(zip(names, map(_plain, row), strict=True))
            for name, row in zip(names, values, strict=True)
        }

    return {
        "preset": found.preset,
        "seed": found.seed,
        "impressions": found.impressions,
        "shares": dict(zip(found.domains, map(_plain, found.shares_D), strict=True)),
        "table_shares": dict(zip(found.domains, map(_plain, found.table_shares_D), strict=True)),
        "rates": by_cell(found.rates_DT),
        "table_rates": by_cell(found.table_rates_DT),
        "positives": by_cell(found.positives_DT),
        "best_auc": by_cell(found.best_auc_DT),
        "best_gauc": by_cell(found.best_gauc_DT),
        "user_overlaps": by_pair(found.user_overlaps),
        "table_user_overlaps": by_pair(found.table_user_overlaps),
        "item_overlaps": by_pair(found.item_overlaps),
        "shown_user_overlaps": by_pair(found.shown_user_overlaps),
        "shown_item_overlaps": by_pair(found.shown_item_overlaps),
        "table_item_overlaps": by_pair(found.table_item_overlaps),
        "task_correlations": square(found.tasks, found.task_correlation_TT),
        "domain_correlations": square(found.domains, found.domain_correlation_DD),
        "num_distinct": found.num_distinct,
    }


def _plain(value: Any) -> float | int | None:
    plain: float | int = value.item()
    return None if np.isnan(plain) else plain
