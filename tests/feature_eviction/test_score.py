from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from feature_eviction import IdTable, ScoreConfig, ScoreError, StateError, TablePolicy, score
from feature_eviction.policy import SHIPPED_SCORES
from feature_eviction.shipped_scores import DAY_S, shipped, shipped_score
from feature_eviction.user_score import Score, _compiled_by_tag, resolve_score

HALF_LIFE_S = 3600.0
TABLE = [1.0]


@score
def recent_positives(old: float, shows: int, positives: int, age_s: int, updates: int) -> float:
    return old * 0.5 ** (age_s / HALF_LIFE_S) + positives


def fed(policy: TablePolicy, given: Score | None = None) -> IdTable:
    """A stream of one minute a call whose ids come and go, more than fit."""
    table = IdTable(policy, score=given)
    generator = np.random.default_rng(12)
    for minute in range(60):
        keys_N = generator.zipf(1.2, 30) % 300
        positives_N = generator.integers(0, 2, 30)
        result = table.map(
            keys_N, shows_N=np.ones(30, int), positives_N=positives_N, now_s=1_700_000_000 + 60 * minute
        )
        table.release(result.batch)
    return table


def test_score_is_still_plain_python() -> None:
    assert recent_positives(8.0, 1, 1, 3600, 9) == 5.0


def test_score_in_the_kernel_gives_what_plain_python_gives() -> None:
    table = IdTable(TablePolicy(num_slots=4), score=recent_positives)
    old, last_s = np.float32(0.0), 1_000
    for now_s, shows, positives in ((1_000, 3, 2), (4_000, 1, 0), (4_100, 5, 5), (90_000, 2, 1)):
        table.map([7], shows_N=[shows], positives_N=[positives], now_s=now_s)
        old = np.float32(recent_positives(float(old), shows, positives, now_s - last_s, 0))
        last_s = now_s
        assert table.rows().scores_N.tolist() == [old]


def test_row_of_the_lowest_user_score_leaves() -> None:
    table = IdTable(TablePolicy(num_slots=2, victim_window=2), score=recent_positives)
    # Key 1 has more positives, all of them long ago.
    table.release(table.map([1], shows_N=[4], positives_N=[4], now_s=10_000).batch)
    table.release(table.map([2], shows_N=[1], positives_N=[1], now_s=10_000 + 5 * 3600).batch)
    result = table.map([3], shows_N=[1], positives_N=[0], now_s=10_000 + 5 * 3600)
    assert result.evicted_keys_K.tolist() == [1]


@pytest.mark.slow
def test_score_named_in_the_configuration_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop_scores.py").write_text(
        "from feature_eviction import score\n"
        "@score\n"
        "def shows_only(old, shows, positives, age_s, updates):\n"
        "    return old + shows\n"
        "plain = len\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    policy = TablePolicy(num_slots=8, victim_window=8, score=ScoreConfig(kind="shop_scores:shows_only"))
    like_lfu = fed(policy)
    lfu = fed(TablePolicy(num_slots=8, victim_window=8, score=ScoreConfig(kind="lfu")))
    assert like_lfu.rows().keys_N.tolist() == lfu.rows().keys_N.tolist()
    for kind, message in (
        ("shop_scores:plain", "decorator @score expected"),
        ("shop_scores:absent", "no attribute 'absent'"),
        ("no_such_module:any", "No module named"),
    ):
        with pytest.raises(ScoreError, match=message):
            IdTable(TablePolicy(num_slots=8, score=ScoreConfig(kind=kind)))


def test_kind_that_is_neither_shipped_nor_a_name_is_refused() -> None:
    for kind in ("mru", "os.system", "a:b:c", "pkg/mod:f", ""):
        with pytest.raises(ValueError, match="kind must be one of"):
            ScoreConfig(kind=kind)


def wrong_arguments(old: float, age_s: int) -> float:
    return old


def logarithm_of_age(old: float, shows: int, positives: int, age_s: int, updates: int) -> float:
    return math.log(age_s)


def share_of_positives(old: float, shows: int, positives: int, age_s: int, updates: int) -> float:
    return positives / shows


def without_bound(old: float, shows: int, positives: int, age_s: int, updates: int) -> float:
    return old * 1e30 + 1.0


def sometimes_nothing(old: float, shows: int, positives: int, age_s: int, updates: int) -> float | None:
    if shows:
        return old
    return None


def reads_a_file(old: float, shows: int, positives: int, age_s: int, updates: int) -> float:
    worth = old
    return worth + len(open("x").read())


def uses_a_list(old: float, shows: int, positives: int, age_s: int, updates: int) -> float:
    return TABLE[0]


@pytest.mark.parametrize(
    ("function", "line", "message"),
    [
        (wrong_arguments, 0, r"must take \(old, shows, positives, age_s, updates\), found \(old, age_s\)"),
        (logarithm_of_age, 0, r"age_s=0, updates=1\) returns -inf"),
        (share_of_positives, 0, r"shows=0, positives=0.* raises ZeroDivisionError"),
        (without_bound, 0, r"returns 1\.0\d*e\+60, which orders no rows"),
        (sometimes_nothing, 0, "must return a number on every path"),
        (reads_a_file, 2, "cannot be compiled.*open"),
        (uses_a_list, 0, "uses 'TABLE', a list"),
    ],
)
def test_error_in_a_score_is_found_with_its_line_when_the_table_is_made(
    function: Callable[..., float], line: int, message: str
) -> None:
    place = f"test_score.py:{function.__code__.co_firstlineno + line}:"
    with pytest.raises(ScoreError, match=message) as caught:
        IdTable(TablePolicy(num_slots=8), score=score(function))
    assert place in str(caught.value)


@pytest.mark.slow
def test_score_that_overflows_later_keeps_the_row_its_last_one_and_is_counted() -> None:
    @score
    def doubling(old: float, shows: int, positives: int, age_s: int, updates: int) -> float:
        return min(old, 1e30) * 1e4 + 1.0 if updates > 2**31 else old * 2 + 1.0

    with pytest.raises(ScoreError, match="orders no rows"):
        IdTable(TablePolicy(num_slots=2), score=score(without_bound))
    # Tripled at each sighting: no single trial finds it, a hundred sightings do.
    tripling = score(lambda old, shows, positives, age_s, updates: old * 3.0 + 1.0)
    table = IdTable(TablePolicy(num_slots=2), score=tripling)
    for now_s in range(100):
        table.release(table.map([1], shows_N=[1], positives_N=[0], now_s=now_s).batch)
    counters = table.counters()
    assert counters.bad_scores > 0
    assert math.isfinite(float(table.rows().scores_N[0]))
    assert doubling(1.0, 1, 1, 1, 1) == 3.0


def test_state_belongs_to_its_score() -> None:
    policy = TablePolicy(num_slots=8)
    table = fed(policy, recent_positives)
    loaded = IdTable.load(policy, table.state(), score=recent_positives)
    assert loaded.rows().scores_N.tolist() == table.rows().scores_N.tolist()
    with pytest.raises(StateError, match=r"kraken by the policy, found .*recent_positives"):
        IdTable.load(policy, table.state())


def test_scores_of_equal_text_are_one_compiled_form_and_others_are_not() -> None:
    def made(constant: float) -> Score:
        return score(lambda old, shows, positives, age_s, updates: old + constant)

    tags = [type(resolve_score(ScoreConfig(), made(constant))) for constant in (1.0, 1.0, 2.0)]
    assert tags[0] is tags[1]
    assert tags[0] is not tags[2]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A score that reads of other modules: a number, one of a package's, and one that its function reads."""
    (tmp_path / "shop").mkdir()
    sources = {
        "__init__": "",
        "numbers": "SHOW_WORTH = 50.0\nUNUSED = [1.0]\nlog = []\n",
        "decay": "from shop import numbers\nFACTORS = (0.5, (2.0,))\n",
        "helpers": (
            "import numba\n"
            "from math import exp\n"
            "import shop.decay\n"
            "@numba.njit\n"
            "def aged(old, age_s, power=1.0):\n"
            "    return old * shop.decay.FACTORS[0] ** power * exp(-1e-9 * age_s)\n"
        ),
        "scores": (
            "import math\n"
            "import shop.decay as decay\n"
            "from feature_eviction import score\n"
            "from shop import helpers\n"
            "from shop import numbers\n"
            "@score\n"
            "def worth(old, shows, positives, age_s, updates):\n"
            "    gained = [numbers.SHOW_WORTH * share for share in (1.0, 1.0)]\n"
            "    kept = helpers.aged(old, age_s) + helpers.aged(0.0, age_s)\n"
            "    return kept + gained[0] * shows + math.log(2.0 + decay.FACTORS[1][0])\n"
        ),
    }
    for name, source in sources.items():
        (tmp_path / "shop" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("shop.scores")
    for name in [one for one in sys.modules if one.partition(".")[0] == "shop"]:
        del sys.modules[name]


def tag_of(given: Score) -> str:
    return type(resolve_score(ScoreConfig(), given)).__name__


def test_score_whose_modules_constant_changed_is_compiled_anew(
    shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tag_of(shop.worth)
    assert tag_of(shop.worth) == before
    monkeypatch.setattr(shop.numbers, "SHOW_WORTH", 5.0)
    after = tag_of(shop.worth)
    assert after != before
    for tag, show_worth in ((before, 50.0), (after, 5.0)):
        assert _compiled_by_tag[tag](0.0, 2, 0, 0, 2) == pytest.approx(2 * show_worth + math.log(4.0))


def with_default(power: float) -> Callable[..., float]:
    def aged(old: float, age_s: int, power: float = power) -> float:
        return old / (1.0 + age_s) ** power

    return aged


@pytest.mark.parametrize(
    ("module", "name", "changed"),
    [
        ("decay", "FACTORS", (0.25, (2.0,))),
        ("decay", "FACTORS", (0.5, (3.0,))),
        ("helpers", "aged", numba.njit(with_default(1.0))),
        ("helpers", "exp", math.expm1),
    ],
)
def test_all_that_a_score_reads_of_modules_belongs_to_it(
    module: str, name: str, changed: object, shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {tag_of(shop.worth)}
    monkeypatch.setattr(sys.modules[f"shop.{module}"], name, changed)
    tags.add(tag_of(shop.worth))
    assert len(tags) == 2


def test_default_of_a_scores_function_belongs_to_it_and_what_no_score_reads_does_not(
    shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shop.helpers, "aged", numba.njit(with_default(1.0)))
    before = tag_of(shop.worth)
    monkeypatch.setattr(shop.numbers, "UNUSED", 2.0)
    assert tag_of(shop.worth) == before
    monkeypatch.setattr(shop.helpers, "aged", numba.njit(with_default(2.0)))
    assert tag_of(shop.worth) != before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("numbers.UNUSED[0]", "uses 'numbers.UNUSED', a list"),
        ("numbers.ABSENT", "uses 'numbers.ABSENT', which is not there"),
        ("(numbers if shows else decay).FACTORS[0]", "uses 'numbers', a module"),
        ("plain(old)", "uses 'plain', a function"),
        ("kept(old)", r"uses 'kept', a function under numba\.njit\(cache=True\), .* Leave cache=True out"),
    ],
)
def test_what_could_change_unseen_is_refused(body: str, message: str, shop: Any, tmp_path: Path) -> None:
    (tmp_path / "shop" / "more.py").write_text(
        "import numba\n"
        "from feature_eviction import score\n"
        "from shop import decay, numbers\n"
        "def plain(old): return old\n"
        "@numba.njit(cache=True)\n"
        "def kept(old): return old * decay.FACTORS[0]\n"
        "@score\n"
        f"def worth(old, shows, positives, age_s, updates): return {body}\n"
    )
    with pytest.raises(ScoreError, match=message):
        IdTable(TablePolicy(num_slots=2), score=importlib.import_module("shop.more").worth)


@pytest.mark.slow
def test_compiled_user_score_is_found_again_by_the_next_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from feature_eviction import IdTable, TablePolicy, score\n"
        "from feature_eviction.mapping import map_sightings\n"
        "@score\n"
        "def kept(old, shows, positives, age_s, updates):\n"
        "    return old + 17.25 * shows\n"
        "table = IdTable(TablePolicy(num_slots=4), score=kept)\n"
        "table.map([1], shows_N=[2], positives_N=[0], now_s=5)\n"
        "print(table.rows().scores_N[0], sum(map_sightings.stats.cache_hits.values()))\n"
    )
    root = Path(__file__).parents[2]
    outputs = [
        subprocess.run(
            [sys.executable, str(program)],
            cwd=root,
            env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert outputs[1] == ["34.5", "1"]


def value(config: ScoreConfig, *arguments: float) -> float:
    return float(shipped_score(shipped(config), *arguments))


def test_shipped_scores_are_what_they_are_called() -> None:
    kraken = ScoreConfig(kind="kraken", positive_weight=3.0, decay_per_day=0.1)
    assert value(kraken, 10.0, 4, 1, DAY_S, 0) == pytest.approx(10 * 0.9 + 3 + 3)
    assert value(ScoreConfig(kind="show_click"), 10.0, 4, 1, DAY_S, 0) == pytest.approx(9.8 + 1.0 + 0.3)
    assert value(ScoreConfig(kind="lru"), 1.0, 0, 0, 77, 5) == -77.0
    assert value(ScoreConfig(kind="lfu"), 1.0, 0, 0, 77, 5) == 5.0
    assert value(ScoreConfig(kind="distance_lfu", distance_power=2.0), 1.0, 0, 0, 9, 500) == 5.0
    assert value(ScoreConfig(kind="ttl_only"), 9.0, 1, 1, 7, 3) == 0.0


@pytest.mark.parametrize("kind", SHIPPED_SCORES)
def test_every_shipped_score_stays_finite_over_all_event_times(kind: str) -> None:
    config = ScoreConfig(kind=kind, decay_per_day=0.999, positive_weight=1e5)
    old = 0.0
    for age_s in (0, 1, DAY_S, 10 * 365 * DAY_S, 2**32 - 1, 0, 0):
        old = value(config, old, 2**31, 2**31, age_s, 2**32 - 1)
        assert math.isfinite(float(np.float32(old)))
        assert math.isfinite(value(config, old, 0, 0, 2**32 - 1, 2**32 - 1))


def test_kraken_order_after_ten_years_is_that_of_exact_decay() -> None:
    """Rows of thirty days, ten years after the first event, against float64 decayed day by day."""
    generator = np.random.default_rng(17)
    config = ScoreConfig(positive_weight=3.0, decay_per_day=0.1)
    start_s = 1_700_000_000 + 10 * 365 * DAY_S
    now_s = start_s + 30 * DAY_S
    stored, exact = [], []
    for _ in range(200):
        kept, last_s, gathered = np.float32(0.0), start_s, 0.0
        for seen_s in np.sort(generator.integers(start_s, now_s, generator.integers(1, 20))).tolist():
            shows = int(generator.integers(1, 9))
            positives = int(generator.integers(0, shows + 1))
            kept = np.float32(value(config, float(kept), shows, positives, seen_s - last_s, 1))
            gathered = gathered * 0.9 ** ((seen_s - last_s) / DAY_S) + 3.0 * positives + shows - positives
            last_s = seen_s
        stored.append(value(config, float(kept), 0, 0, now_s - last_s, 1))
        exact.append(gathered * 0.9 ** ((now_s - last_s) / DAY_S))
    stored_N, exact_N = np.array(stored), np.array(exact)
    assert stored_N == pytest.approx(exact_N, rel=1e-5)
    apart = exact_N[:, None] > exact_N[None, :] * (1 + 2e-5)
    assert apart.sum() > 15_000
    assert (stored_N[:, None] > stored_N[None, :])[apart].all()
