"""A seeded stream of impressions whose true probabilities are known, calibrated to PEPNet's Table 1.

Shapes: N impressions, D domains, T tasks, K taste dimensions.

The true logit of a task is a bias of (domain, task), calibrated so that the rates are the table's,
plus effects of user and item (through group, author and category), plus a taste product of user and
item that domains and tasks weigh differently, plus the item's age. Users' taste turns over event time,
items are born and die, so a model that stands still goes stale. Labels are drawn independently given
the probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.config.config import Config
from trainer.config.schema import SchemaConfig
from trainer.data import population, seesaw, table1
from trainer.errors import ConfigError
from trainer.stream.columns import Impressions, Jagged
from trainer.stream.slicing import concat_impressions, slice_impressions

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CHUNK_MAX = 1_024
CHUNK_S_MAX = 7_200.0
"""Impressions drawn at once, and the event time that they may span, since they share one set of items.
Each chunk has its own generator, so the stream does not depend on the batch size in which it is read."""
CHUNK_MIN = 16
EVENT_START_MS = 1_662_854_400_000
"""2022-09-11 00:00 UTC, the first day of Table 1."""
EXPOSURE_STEP_S = 3_600.0
"""How often the set of items that can be shown is renewed, in event time."""
SCALE_MIN = 1e-4
"""Below it a domain may have no item alive."""
DRIFT_TURN_DAYS = 40.0
"""Event time in which taste turns by a right angle."""

# How strongly each source moves the logit, by task: columns as table1.TASKS.
COMMON_LOADS_T = np.array([0.8, 0.7, 0.7, -0.6, 0.8, 0.8], np.float32)
USER_SCALE_T = np.array([0.8, 0.8, 0.8, 0.8, 0.95, 0.8], np.float32)
ITEM_SCALE_T = np.array([0.9, 0.9, 0.9, 0.9, 1.15, 1.0], np.float32)
TASTE_SCALE_T = np.array([0.6, 0.6, 0.6, -0.5, 0.80, 0.7], np.float32)
AGE_SCALE_T = np.array([0.2, 0.1, 0.1, 0.0, 0.25, 0.2], np.float32)
CALIBRATION_ROUNDS = 40
CALIBRATION_CHUNKS = 96

FEATURES = (
    "domain",
    "user_id",
    "user_group",
    "item_id",
    "category",
    "tags",
    "author_id",
    "hour",
    "item_age_h",
    "domain_click_rate",
)


@dataclass(frozen=True, slots=True)
class _Draw:
    """Who saw what, where and when."""

    event_s_N: npt.NDArray[np.float64]
    domain_N: npt.NDArray[np.uint8]
    user_N: Ints
    item_N: Ints


class SyntheticStream:
    """config.impressions impressions over config.produce.event_days of event time.

    Equal (seed, scale, event_days, impressions) give an equal stream.
    Raises: ConfigError if the schema has a feature, domain or task that the stream does not have.
    """

    def __init__(self, config: Config) -> None:
        check_schema(config.schema)
        if config.produce.scale < SCALE_MIN:
            raise ConfigError(
                f"produce.scale must be at least {SCALE_MIN:g} for the synthetic stream, "
                f"found {config.produce.scale:g}"
            )
        self._schema = config.schema
        self._seed = config.seed
        self.num_impressions = config.impressions
        self._event_s = config.produce.event_days * 86_400.0
        num_at_once = int(config.impressions * CHUNK_S_MAX / self._event_s)
        self._chunk = min(CHUNK_MAX, max(CHUNK_MIN, num_at_once))
        rng = np.random.default_rng([config.seed, 0])
        produce = config.produce
        scale, loads_T = produce.scale, seesaw.task_loads(COMMON_LOADS_T, task_conflict=produce.task_conflict)
        self.users = population.make_users(
            rng,
            scale=scale,
            loads_T=loads_T,
            group_taste_share=produce.group_taste_share,
            group_effect_share=produce.group_effect_share,
        )
        self.items = population.make_items(rng, scale=scale, event_s=self._event_s, loads_T=loads_T)
        num_domains, num_tasks = table1.RATES_DT.shape
        # Around 1: every domain and task shares the taste space, and weighs its dimensions in its own way.
        self._taste_DTK = np.exp(
            produce.taste_spread * rng.standard_normal((num_domains, num_tasks, population.TASTE_DIM))
        ).astype(np.float32)
        self._taste_scale_T = np.float32(produce.taste_scale) * TASTE_SCALE_T
        self._seesaw: seesaw.Seesaw | None = None
        if produce.domain_conflict or produce.task_conflict:
            self._seesaw = seesaw.plant(
                np.random.default_rng([config.seed, 3]),
                domain_conflict=produce.domain_conflict,
                task_conflict=produce.task_conflict,
                num_authors=self.items.num_authors,
                loads_T=loads_T,
            )
        self._user_cdf_D = [
            np.cumsum(np.where(self.users.regions_U >> domain & 1, self.users.popularity_U, 0.0))
            for domain in range(num_domains)
        ]
        self._domain_index = np.array([table1.DOMAINS.index(name) for name in config.schema.domains])
        self._task_index = np.array([table1.TASKS.index(name) for name in config.schema.task_names])
        shares_D = table1.domain_shares()[self._domain_index]
        self._domain_cdf = np.cumsum(shares_D / shares_D.sum())
        self._exposure = _Exposure(self.items)
        self.bias_DT = self._calibrated_bias()

    def batches(self, num: int) -> Iterator[tuple[Impressions, Floats]]:
        """Batches of `num` impressions (the last may be shorter) with their true probabilities [N, T].

        domain_N and labels follow the schema's order; produced_ms_N is 0 (the producer's record stamps it).
        """
        if num < 1:
            raise ValueError(f"a batch has at least 1 impression, found {num}")
        waiting: list[tuple[Impressions, Floats]] = []
        num_waiting = 0
        for chunk in self._chunks():
            waiting.append(chunk)
            num_waiting += len(chunk[0])
            if num_waiting < num:
                continue
            impressions = concat_impressions([part for part, _ in waiting])
            truth_NT = np.concatenate([part_NT for _, part_NT in waiting])
            whole = num_waiting - num_waiting % num
            for start in range(0, whole, num):
                yield slice_impressions(impressions, start, start + num), truth_NT[start : start + num]
            num_waiting -= whole
            waiting = [(slice_impressions(impressions, whole, len(impressions)), truth_NT[whole:])]
        if num_waiting:
            yield (
                concat_impressions([part for part, _ in waiting]),
                np.concatenate([part_NT for _, part_NT in waiting]),
            )

    def probe(self, *, num_users: int, num_items: int) -> Floats:
        """True logits of users by items in every domain, seen there or not: float32 [D, U, I, T], in
        the schema's order. They are drawn as in the middle of the stream, items from all domains."""
        rng = np.random.default_rng([self._seed, 4])
        num = max(num_users, num_items)
        middle = self._draw(rng, np.full(num, self._event_s / 2))
        user_P = np.repeat(middle.user_N[:num_users], num_items)
        item_P = np.tile(middle.item_N[:num_items], num_users)
        event_s_P = np.full(len(user_P), self._event_s / 2)
        logits_DPT = np.stack(
            [
                self._logits(_Draw(event_s_P, np.full(len(user_P), domain, np.uint8), user_P, item_P))
                for domain in self._domain_index
            ]
        )[:, :, self._task_index]
        return logits_DPT.reshape(len(self._domain_index), num_users, num_items, len(self._task_index))

    def _chunks(self) -> Iterator[tuple[Impressions, Floats]]:
        """The whole stream, a chunk at a time."""
        click = table1.TASKS.index("click")
        # A running click rate of each domain, begun at the table's with the weight of 1000 impressions.
        shown_D = np.full(len(table1.DOMAINS), 1_000.0)
        clicked_D = table1.RATES_DT[:, click] * shown_D
        for chunk, first in enumerate(range(0, self.num_impressions, self._chunk)):
            rng = np.random.default_rng([self._seed, 1, chunk])
            num = min(self._chunk, self.num_impressions - first)
            step_s = self._event_s / self.num_impressions
            event_s_N = (first + np.arange(num) + rng.random(num)) * step_s
            draw = self._draw(rng, event_s_N)
            logits_NT = self._logits(draw) + self.bias_DT[draw.domain_N]
            truth_NT = (1.0 / (1.0 + np.exp(-logits_NT))).astype(np.float32)
            labels_NT = (rng.random(truth_NT.shape, dtype=np.float32) < truth_NT).astype(np.float32)
            rate_D = clicked_D / shown_D
            yield (
                self._impressions(draw, labels_NT=labels_NT, click_rate_D=rate_D, first=first),
                truth_NT[:, self._task_index],
            )
            shown_D = 0.9 * shown_D + np.bincount(draw.domain_N, minlength=len(shown_D))
            clicked_D = 0.9 * clicked_D + np.bincount(draw.domain_N, labels_NT[:, click], len(shown_D))

    def _draw(self, rng: np.random.Generator, event_s_N: npt.NDArray[np.float64]) -> _Draw:
        """Domain, user and item of each impression; users and items belong to the domain."""
        num = len(event_s_N)
        picked_N = np.minimum(np.searchsorted(self._domain_cdf, rng.random(num)), len(self._domain_cdf) - 1)
        domain_N = self._domain_index[picked_N].astype(np.uint8)
        user_N = np.zeros(num, np.int64)
        item_N = np.zeros(num, np.int64)
        self._exposure.move_to(float(event_s_N[0]) if num else 0.0)
        for domain in range(len(table1.DOMAINS)):
            row_M = np.flatnonzero(domain_N == domain)
            user_N[row_M] = _pick(self._user_cdf_D[domain], rng.random(len(row_M)))
            item_N[row_M] = self._exposure.pick(domain, rng.random(len(row_M)))
        return _Draw(event_s_N, domain_N, user_N, item_N)

    def _logits(self, draw: _Draw) -> Floats:
        """Everything but the bias: float32 [N, T]."""
        users, items = self.users, self.items
        angle_N1 = (draw.event_s_N / 86_400.0 / DRIFT_TURN_DAYS * np.pi / 2).astype(np.float32)[:, None]
        taste_NK = (
            np.cos(angle_N1) * users.taste_UK[draw.user_N] + np.sin(angle_N1) * users.drift_UK[draw.user_N]
        )
        item_taste_NK = items.taste_IK[draw.item_N]
        user_effect_NT, item_effect_NT = users.effect_UT[draw.user_N], items.effect_IT[draw.item_N]
        taste_NT = np.empty((len(draw.user_N), len(table1.TASKS)), np.float32)
        for domain in range(len(table1.DOMAINS)):
            row_M = np.flatnonzero(draw.domain_N == domain)
            weight_TK = self._taste_DTK[domain]
            norm_T = np.sqrt((weight_TK**2).sum(axis=1))
            if self._seesaw is None:
                taste_NT[row_M] = (taste_NK[row_M] * item_taste_NK[row_M]) @ weight_TK.T / norm_T
                continue
            turned_MTK = self._seesaw.turned(taste_NK[row_M].astype(np.float32, copy=False), domain=domain)
            taste_NT[row_M] = np.einsum("mtk,mk,tk->mt", turned_MTK, item_taste_NK[row_M], weight_TK) / norm_T
            user_effect_NT[row_M] = self._seesaw.effects(
                user_effect_NT[row_M],
                self._seesaw.group_effect_DGT[domain, users.group_U[draw.user_N[row_M]]],
            )
            item_effect_NT[row_M] = self._seesaw.effects(
                item_effect_NT[row_M],
                self._seesaw.author_effect_DWT[domain, items.author_I[draw.item_N[row_M]]],
            )
        age_h_N = (draw.event_s_N - items.birth_s_I[draw.item_N]) / 3_600.0
        fresh_N1 = (1.0 - np.log1p(age_h_N) / 2.0).astype(np.float32)[:, None]
        logits_NT: Floats = (
            USER_SCALE_T * user_effect_NT
            + ITEM_SCALE_T * item_effect_NT
            + self._taste_scale_T * taste_NT
            + AGE_SCALE_T * fresh_N1
        )
        return logits_NT

    def _calibrated_bias(self) -> Floats:
        """The bias at which the mean probability of every domain and task is the table's rate."""
        rng = np.random.default_rng([self._seed, 2])
        start_s_C = np.arange(CALIBRATION_CHUNKS) / CALIBRATION_CHUNKS * self._event_s
        chunk_s = self._event_s * min(1.0, self._chunk / self.num_impressions)
        draws = [self._draw(rng, start_s + np.sort(rng.random(CHUNK_MAX)) * chunk_s) for start_s in start_s_C]
        domain_N = np.concatenate([draw.domain_N for draw in draws])
        logits_NT = np.concatenate([self._logits(draw) for draw in draws]).astype(np.float64)
        low_DT, high_DT = np.full_like(table1.RATES_DT, -20.0), np.full_like(table1.RATES_DT, 20.0)
        for _ in range(CALIBRATION_ROUNDS):
            middle_DT = (low_DT + high_DT) / 2
            for domain in np.unique(domain_N):
                logits_MT = logits_NT[domain_N == domain] + middle_DT[domain]
                below_T = (1.0 / (1.0 + np.exp(-logits_MT))).mean(axis=0) < table1.RATES_DT[domain]
                low_DT[domain] = np.where(below_T, middle_DT[domain], low_DT[domain])
                high_DT[domain] = np.where(below_T, high_DT[domain], middle_DT[domain])
        bias_DT: Floats = ((low_DT + high_DT) / 2).astype(np.float32)
        return bias_DT

    def _impressions(
        self, draw: _Draw, *, labels_NT: Floats, click_rate_D: npt.NDArray[np.float64], first: int
    ) -> Impressions:
        num = len(draw.user_N)
        users, items = self.users, self.items
        schema_domain = np.full(len(table1.DOMAINS), 255, np.uint8)
        schema_domain[self._domain_index] = np.arange(len(self._domain_index), dtype=np.uint8)
        domain_N = schema_domain[draw.domain_N]
        num_tags_N = items.num_tags_I[draw.item_N]
        kept_NM = np.arange(population.TAGS_MAX) < num_tags_N[:, None]
        event_ms_N = EVENT_START_MS + (draw.event_s_N * 1_000.0).astype(np.int64)
        singles = {
            "domain": domain_N.astype(np.int64),
            "user_id": users.ids_U[draw.user_N],
            "user_group": users.group_U[draw.user_N] + 1,
            "item_id": items.ids_I[draw.item_N],
            "category": items.category_I[draw.item_N] + 1,
            "author_id": population.spread_ids(items.author_I[draw.item_N]),
            "hour": event_ms_N // 3_600_000 % 24,
        }
        ones_N = np.ones(num, np.int32)
        jagged = {name: Jagged(ids_N, ones_N) for name, ids_N in singles.items()}
        jagged["tags"] = Jagged(items.tags_IM[draw.item_N][kept_NM] + 1, num_tags_N)
        age_s_N = draw.event_s_N - items.birth_s_I[draw.item_N]
        numbers = {
            "item_age_h": (age_s_N / 3_600.0).astype(np.float32),
            "domain_click_rate": click_rate_D[draw.domain_N].astype(np.float32),
        }
        names = [feature.name for feature in self._schema.features]
        return Impressions(
            request_ids_N=_request_ids(self._seed, first, num),
            user_ids_N=singles["user_id"],
            event_time_ms_N=event_ms_N,
            produced_ms_N=np.zeros(num, np.int64),
            domain_N=domain_N,
            sparse={name: jagged[name] for name in names if name in jagged},
            dense={name: numbers[name] for name in names if name in numbers},
            labels_NT=labels_NT[:, self._task_index],
            known_NT=np.ones((num, len(self._task_index)), np.bool_),
        )


class _Exposure:
    """Which items can be shown now, and how likely each: popularity times what is left of its life."""

    def __init__(self, items: population.Items) -> None:
        self._items = items
        self._at_s: float | None = None
        self._item_M: Ints = np.zeros(0, np.int64)
        self._cdf_D: list[npt.NDArray[np.float64]] = []

    def move_to(self, event_s: float) -> None:
        """Renew the set once a step; a pure function of the step, whatever was asked before."""
        at_s = np.floor(event_s / EXPOSURE_STEP_S) * EXPOSURE_STEP_S
        if at_s == self._at_s:
            return
        items = self._items
        longest_s = population.LIFETIME_DAYS_MAX * 86_400.0
        first, last = np.searchsorted(items.birth_s_I, [at_s - longest_s, at_s])
        born_M = slice(int(first), int(last))
        left_M = 1.0 - (at_s - items.birth_s_I[born_M]) / items.lifetime_s_I[born_M]
        weight_M = items.popularity_I[born_M] * np.maximum(left_M, 0.0)
        self._cdf_D = [
            np.cumsum(np.where(items.regions_I[born_M] >> domain & 1, weight_M, 0.0))
            for domain in range(len(table1.DOMAINS))
        ]
        self._item_M = np.arange(born_M.start, born_M.stop)
        self._at_s = at_s

    def pick(self, domain: int, uniform_M: npt.NDArray[np.float64]) -> Ints:
        picked_M: Ints = self._item_M[_pick(self._cdf_D[domain], uniform_M)]
        return picked_M


def _pick(cdf: npt.NDArray[np.float64], uniform_M: npt.NDArray[np.float64]) -> Ints:
    """Index by an unnormalised cumulative weight; entries of weight zero are never picked."""
    index_M: Ints = np.searchsorted(cdf, uniform_M * cdf[-1], side="right")
    # Rounding may bring the product up to the very end, behind the last entry that has a weight.
    last = np.searchsorted(cdf, cdf[-1], side="left")
    picked_M: Ints = np.minimum(index_M, last)
    return picked_M


def _request_ids(seed: int, first: int, num: int) -> npt.NDArray[np.uint64]:
    """Unique within a stream: an odd multiple modulo 2^64 is a bijection of the running number."""
    number_N = np.uint64(seed % (1 << 20) << 40) + np.arange(first, first + num, dtype=np.uint64)
    request_ids_N: npt.NDArray[np.uint64] = number_N * np.uint64(0x9E37_79B9_7F4A_7C15)
    return request_ids_N


def check_schema(schema: SchemaConfig) -> None:
    """Raises: ConfigError if the schema has a feature, domain or task that the stream does not have."""
    for what, found, known in (
        ("features", [feature.name for feature in schema.features], FEATURES),
        ("domains", list(schema.domains), table1.DOMAINS),
        ("tasks", schema.task_names, table1.TASKS),
    ):
        unknown = [name for name in found if name not in known]
        if unknown:
            raise ConfigError(
                f"schema: the synthetic stream has no {what} {', '.join(unknown)}; it has "
                f"{', '.join(known)}. A stream of your own comes by Kafka, to `trainer train` "
                "(docs/your_data.md)"
            )
    for task in schema.tasks:
        if task.label != "recorded":
            raise ConfigError(
                f"schema: task '{task.name}': label '{task.label}' is made of watch time; the synthetic "
                f"stream draws its labels and has none, so label must be 'recorded'"
            )
