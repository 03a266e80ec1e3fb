"""How old is what serving has not got: since the first change that no durable version was taken for."""

from __future__ import annotations

from trainer.publish.backlog import Backlog


def test_age_counts_from_the_first_change_and_ends_with_the_ack() -> None:
    backlog = Backlog()
    assert (backlog.age_ms(now_ms=50), backlog.ack_age_s(now_ms=50)) == (0, -1.0)
    backlog.changed(now_ms=100)
    backlog.changed(now_ms=150)
    backlog.take()
    backlog.changed(now_ms=200)
    assert backlog.age_ms(now_ms=300) == 200, "taken is not arrived"
    backlog.ack(now_ms=310)
    assert backlog.age_ms(now_ms=310) == 110
    assert backlog.ack_age_s(now_ms=1310) == 1.0


def test_a_version_that_fails_leaves_its_changes_as_old_as_they_are() -> None:
    backlog = Backlog()
    backlog.changed(now_ms=100)
    backlog.take()
    backlog.changed(now_ms=200)
    backlog.abandon()
    backlog.changed(now_ms=300)
    assert backlog.age_ms(now_ms=400) == 300
    backlog.take()
    backlog.ack(now_ms=410)
    assert backlog.age_ms(now_ms=500) == 0


def test_a_version_without_changes_that_fails_makes_nothing_older() -> None:
    backlog = Backlog()
    backlog.take()
    backlog.changed(now_ms=200)
    backlog.abandon()
    assert backlog.age_ms(now_ms=250) == 50
