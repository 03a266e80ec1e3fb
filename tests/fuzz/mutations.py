"""Seeded mutations of a corpus: a fuzzer without coverage, for where atheris is not installed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
LENGTHS = (0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
INPUT_BYTES_MAX = 1 << 16


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes of `data`; `other` is a second input to splice with."""
    result = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, len(result) + 1))
        length = int(rng.integers(1, 17))
        kind = int(rng.integers(0, 8))
        if kind == 0 and at < len(result):
            result[at] ^= 1 << int(rng.integers(8))
        elif kind == 1 and at < len(result):
            result[at] = INTERESTING[int(rng.integers(len(INTERESTING)))]
        elif kind == 2:
            del result[at : at + length]
        elif kind == 3:
            result[at:at] = rng.bytes(length)
        elif kind == 4:
            result[at:at] = result[at : at + length] * int(rng.integers(1, 5))
        elif kind == 5:
            result[at : at + 8] = LENGTHS[int(rng.integers(len(LENGTHS)))].to_bytes(8, "little")
        elif kind == 6:
            result[at:] = other[min(at, len(other)) :]
        else:
            _change_number(result, rng)
    return bytes(result[:INPUT_BYTES_MAX])


def _change_number(result: bytearray, rng: np.random.Generator) -> None:
    """Replace a run of digits, as JSON headers have them."""
    digits = [i for i, byte in enumerate(result) if 48 <= byte <= 57]
    if not digits:
        return
    start = digits[int(rng.integers(len(digits)))]
    end = start
    while end < len(result) and 48 <= result[end] <= 57:
        end += 1
    numbers = ("0", "-1", "1", "8", "255", "4096", str(2**31), str(2**63), "1e9", "9" * 40)
    result[start:end] = numbers[int(rng.integers(len(numbers)))].encode()


def hunt(
    fuzz_one: Callable[[bytes], bool], corpus: list[bytes], *, seed: int, runs: int
) -> tuple[int, list[tuple[bytes, Exception]]]:
    """How many inputs were accepted, and the first ten that raised what they must not."""
    rng = np.random.default_rng(seed)
    pool = list(corpus)
    num_accepted, findings = 0, []
    for _ in range(runs):
        one, other = (pool[int(rng.integers(len(pool)))] for _ in range(2))
        data = mutate(one, other, rng)
        try:
            accepted = fuzz_one(data)
        except Exception as error:  # noqa: BLE001 - whatever comes out is what is looked for
            findings.append((data, error))
            if len(findings) == 10:
                break
            continue
        num_accepted += accepted
        # What is accepted leads further in; the pool stays bounded.
        if accepted and len(pool) < 1000:
            pool.append(data)
    return num_accepted, findings
