"""Users, items and authors of the synthetic stream: who is where, how popular, how alive, how liked.

Shapes: U users, I items, W authors, C categories, G groups, D domains, T tasks, K taste dimensions.
Everything is drawn from one generator, so equal seeds give equal populations.

Arithmetic at the default scale 0.02: Table 1's domains unite to 193 k users and 14.9 M items; two
percent of them are 3.9 k users and 297 k items, of which 200,000 impressions meet all users and a
quarter of the items (68 k; popularity is Zipf-Mandelbrot, and an item lives for some days only).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data import table1

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

NUM_GROUPS = 48
NUM_CATEGORIES = 40
ITEMS_PER_AUTHOR = 40
NUM_TAGS = 400
TAGS_MAX = 5
TASTE_DIM = 6
GROUP_TASTE_SHARE = 0.75
GROUP_EFFECT_SHARE = 0.4
USER_ZIPF = 0.6
ITEM_ZIPF = 0.95
ITEM_ZIPF_HEAD = 100.0
AUTHOR_ZIPF = 0.8
LIFETIME_DAYS_MIN = 0.5
LIFETIME_DAYS_MAX = 4.0

ID_BITS = 52
ID_MULTIPLIER = 0x9_E377_9B97_F4A7
"""Odd, so that multiplying modulo 2^52 is a bijection: ids look like a platform's, and never collide."""


@dataclass(frozen=True, slots=True)
class Users:
    """Everything about users; `regions_U` is a bit mask of the domains in which a user is seen."""

    ids_U: Ints
    regions_U: npt.NDArray[np.uint8]
    popularity_U: npt.NDArray[np.float64]
    group_U: Ints
    taste_UK: Floats
    drift_UK: Floats
    """Taste turns from taste_UK towards this over event time."""
    effect_UT: Floats


@dataclass(frozen=True, slots=True)
class Items:
    """Everything about items, sorted by birth, so that the items alive are found in one range."""

    ids_I: Ints
    regions_I: npt.NDArray[np.uint8]
    popularity_I: npt.NDArray[np.float64]
    birth_s_I: npt.NDArray[np.float64]
    """Seconds since the stream's first event."""
    lifetime_s_I: npt.NDArray[np.float64]
    num_authors: int
    author_I: Ints
    category_I: Ints
    tags_IM: Ints
    """[I, TAGS_MAX]; the first num_tags_I of a row count."""
    num_tags_I: npt.NDArray[np.int32]
    taste_IK: Floats
    effect_IT: Floats


def make_users(
    rng: np.random.Generator,
    *,
    scale: float,
    loads_T: Floats,
    group_taste_share: float = GROUP_TASTE_SHARE,
    group_effect_share: float = GROUP_EFFECT_SHARE,
) -> Users:
    """Args:
    loads_T: float32 [T], how each task follows the effect that all tasks share.
    group_taste_share, group_effect_share: how much of a user's taste and effect is the group's; the rest
        is the user's own.
    """
    regions_U = _regions(rng, table1.regions(table1.USERS_K, table1.USER_OVERLAPS, scale=scale))
    num = len(regions_U)
    group_U = rng.integers(0, NUM_GROUPS, num)
    group_taste_GK = _normal(rng, NUM_GROUPS, TASTE_DIM)
    group_effect_GT = draw_effects(rng, NUM_GROUPS, loads_T)
    return Users(
        ids_U=spread_ids(np.arange(num)),
        regions_U=regions_U,
        popularity_U=_zipf(rng, num, USER_ZIPF),
        group_U=group_U,
        taste_UK=_blend(group_taste_GK[group_U], _normal(rng, num, TASTE_DIM), share=group_taste_share),
        drift_UK=_blend(
            _normal(rng, NUM_GROUPS, TASTE_DIM)[group_U],
            _normal(rng, num, TASTE_DIM),
            share=group_taste_share,
        ),
        effect_UT=_blend(group_effect_GT[group_U], draw_effects(rng, num, loads_T), share=group_effect_share),
    )


def make_items(rng: np.random.Generator, *, scale: float, event_s: float, loads_T: Floats) -> Items:
    """Items born from one longest lifetime before the stream begins until it ends."""
    regions_I = _regions(rng, table1.regions(table1.ITEMS_K, table1.ITEM_OVERLAPS, scale=scale))
    num = len(regions_I)
    num_authors = max(NUM_CATEGORIES, num // ITEMS_PER_AUTHOR)
    author_weight_W = _zipf(rng, num_authors, AUTHOR_ZIPF)
    author_I = rng.choice(num_authors, num, p=author_weight_W)
    category_W = rng.integers(0, NUM_CATEGORIES, num_authors)
    category_I = category_W[author_I]

    category_taste_CK = _normal(rng, NUM_CATEGORIES, TASTE_DIM)
    author_taste_WK = _blend(category_taste_CK[category_W], _normal(rng, num_authors, TASTE_DIM), share=0.75)
    author_effect_WT = _blend(
        draw_effects(rng, NUM_CATEGORIES, loads_T)[category_W],
        draw_effects(rng, num_authors, loads_T),
        share=0.4,
    )
    longest_s = LIFETIME_DAYS_MAX * 86_400.0
    tags_IM, num_tags_I = _tags(rng, category_I)
    return Items(
        ids_I=spread_ids(np.arange(num)),
        regions_I=regions_I,
        popularity_I=_zipf(rng, num, ITEM_ZIPF, head=ITEM_ZIPF_HEAD),
        birth_s_I=np.sort(rng.uniform(-longest_s, event_s, num)),
        lifetime_s_I=rng.uniform(LIFETIME_DAYS_MIN, LIFETIME_DAYS_MAX, num) * 86_400.0,
        num_authors=num_authors,
        author_I=author_I,
        category_I=category_I,
        tags_IM=tags_IM,
        num_tags_I=num_tags_I,
        taste_IK=_blend(author_taste_WK[author_I], _normal(rng, num, TASTE_DIM), share=0.85),
        effect_IT=_blend(author_effect_WT[author_I], draw_effects(rng, num, loads_T), share=0.7),
    )


def spread_ids(index_N: Ints) -> Ints:
    """Raw ids over 52 bits from small indices, one to one."""
    mask = np.uint64((1 << ID_BITS) - 1)
    spread_N = (index_N.astype(np.uint64) + np.uint64(1)) * np.uint64(ID_MULTIPLIER) & mask
    return spread_N.astype(np.int64)


def _regions(rng: np.random.Generator, regions: table1.Regions) -> npt.NDArray[np.uint8]:
    """The region of each entity, independent of its popularity."""
    return rng.permutation(np.repeat(np.arange(8, dtype=np.uint8), regions.counts))


def _zipf(
    rng: np.random.Generator, num: int, exponent: float, *, head: float = 0.0
) -> npt.NDArray[np.float64]:
    """Popularity by (rank + head)^-exponent (Zipf-Mandelbrot) in random order, sum 1."""
    weight_N = (np.arange(1, num + 1, dtype=np.float64) + head) ** -exponent
    return rng.permutation(weight_N / weight_N.sum())


def _normal(rng: np.random.Generator, num: int, width: int) -> Floats:
    return rng.standard_normal((num, width), dtype=np.float32)


def draw_effects(rng: np.random.Generator, num: int, loads_T: Floats) -> Floats:
    """[num, T] of unit variance: each task follows a common effect by its load, the rest is its own."""
    common_N1 = _normal(rng, num, 1)
    own_NT = _normal(rng, num, len(loads_T))
    effects_NT: Floats = loads_T * common_N1 + np.sqrt(1.0 - loads_T**2) * own_NT
    return effects_NT


def _blend(outer: Floats, own: Floats, *, share: float) -> Floats:
    """Unit variance, of which `share` comes from what the entity belongs to."""
    blended: Floats = np.float32(np.sqrt(share)) * outer + np.float32(np.sqrt(1.0 - share)) * own
    return blended


def _tags(rng: np.random.Generator, category_I: Ints) -> tuple[Ints, npt.NDArray[np.int32]]:
    """1..TAGS_MAX tags an item, most of them from the tenth of the tags that its category uses."""
    num = len(category_I)
    usual_IM = (category_I[:, None] * 10 + rng.geometric(0.35, (num, TAGS_MAX))) % NUM_TAGS
    any_IM = rng.integers(0, NUM_TAGS, (num, TAGS_MAX))
    tags_IM = np.where(rng.random((num, TAGS_MAX)) < 0.85, usual_IM, any_IM)
    return tags_IM, rng.integers(1, TAGS_MAX + 1, num).astype(np.int32)
