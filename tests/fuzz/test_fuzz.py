"""The fuzz targets over their corpus and seeded mutations of it; `make fuzz` goes on for longer."""

from __future__ import annotations

import pytest

from tests.fuzz.mutations import hunt
from tests.fuzz.seeds import CORPUS, corpus
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_raises_nothing_undeclared_and_reaches_past_the_first_check(name: str) -> None:
    accepted = [TARGETS[name](data) for data in corpus(name)]
    assert len(accepted) >= 2
    assert any(accepted), "no input of the corpus is good: fuzzing would never get anywhere"
    assert sum(path.stat().st_size for path in (CORPUS / name).iterdir()) < 1 << 16


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_accepted_or_refused_as_declared(name: str) -> None:
    num_accepted, findings = hunt(TARGETS[name], corpus(name), seed=7, runs=20_000)
    assert findings == []
    assert 10 < num_accepted < 19_000


def test_the_hunt_finds_a_planted_bug() -> None:
    """A decoder that believes a length, and one that lets another error through."""

    def believes(data: bytes) -> bool:
        length = int.from_bytes(data[:8], "little")
        return data[8 + length - 1] >= 0 if length else False

    def leaks(data: bytes) -> bool:
        return TARGETS["manifest"](data) and data not in corpus("manifest") and {}["absent"]

    for planted, name, kind in ((believes, "segment", IndexError), (leaks, "manifest", KeyError)):
        _, findings = hunt(planted, corpus(name), seed=1, runs=3000)
        assert findings, planted.__name__
        assert isinstance(findings[0][1], kind)
