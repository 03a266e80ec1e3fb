"""Beyond its share of bad impressions a stream is not learned from any more."""

from __future__ import annotations

import pytest

from trainer.config.config import KafkaConfig
from trainer.errors import StreamError
from trainer.stream.bad_budget import BadBudget, allowance_of_stream


def _budget(share_max: float, window: int) -> BadBudget:
    kafka = KafkaConfig(topic="t", bad_share_max=share_max, bad_window=window)
    return BadBudget(allowance_of_stream(kafka))


def test_the_share_may_be_reached_and_not_passed():
    budget = _budget(0.1, 100)
    for number in range(10):
        budget.add(10, {"label_not_binary:click": 1}, origin=f"t/0/{number}")
        budget.check()
    budget.add(10, {"label_not_binary:click": 2}, origin="t/0/10")
    with pytest.raises(
        StreamError, match=r"11 of the newest 100 .*11\.0%; kafka.bad_share_max allows 10\.0%"
    ):
        budget.check()


def test_a_window_that_is_not_full_judges_as_if_the_rest_were_good():
    budget = _budget(0.1, 100)
    budget.add(10, {"unknown_domain": 10}, origin="t/0/0")
    budget.check()
    budget.add(1, {"unknown_domain": 1}, origin="t/0/1")
    with pytest.raises(StreamError, match="11 of the newest 100"):
        budget.check()


def test_what_is_older_than_the_window_is_forgotten():
    budget = _budget(0.1, 100)
    for number in range(1_000):
        budget.add(10, {"unknown_domain": 10} if number % 10 == 0 else {}, origin=f"t/0/{number}")
        budget.check()
    assert len(budget._records) == 10
    budget.add(10, {"unknown_domain": 10}, origin="t/0/1000")
    budget.check()
    budget.add(10, {"unknown_domain": 10}, origin="t/0/1001")
    with pytest.raises(StreamError, match="20 of the newest 100"):
        budget.check()


def test_a_record_that_tells_nothing_weighs_as_the_newest_that_did():
    budget = _budget(0.5, 100)
    budget.add(None, {"not_decodable": 1}, origin="t/0/0")
    assert budget._bad.total() == 1
    budget.add(40, {}, origin="t/0/1")
    budget.add(None, {"not_decodable": 1}, origin="t/0/2")
    budget.check()
    budget.add(None, {"not_decodable": 1}, origin="t/0/3")
    with pytest.raises(StreamError, match="not_decodable 80"):
        budget.check()


def test_the_error_names_the_commonest_reasons_with_an_origin_and_what_to_do():
    budget = _budget(0.0, 10)
    budget.add(4, {"unknown_domain": 3, "event_time_past": 1}, origin="t/2/17")
    budget.add(4, {"unknown_domain": 1, "event_time_future": 2}, origin="t/0/5")
    budget.add(1, {"not_decodable": 1}, origin="t/1/9")
    with pytest.raises(StreamError) as caught:
        budget.check()
    text = str(caught.value)
    assert "unknown_domain 4 (the last at t/0/5), event_time_future 2 (the last at t/0/5)" in text
    assert text.count("the last at") == 3
    assert "'impressions-dead-letters'" in text
    assert "start once with a higher kafka.bad_share_max" in text


def test_a_share_of_one_never_stops_and_a_share_of_zero_stops_at_the_first():
    anything = _budget(1.0, 5)
    for number in range(20):
        anything.add(3, {"unknown_domain": 3}, origin=f"t/0/{number}")
        anything.check()
    nothing = _budget(0.0, 5)
    nothing.add(3, {}, origin="t/0/0")
    nothing.check()
    nothing.add(3, {"unknown_domain": 1}, origin="t/0/1")
    with pytest.raises(StreamError):
        nothing.check()
