"""KuaiRand's tables of users and videos, for joining to a log.

Ranges, types and encrypted one-hot columns become ids by their words (word_id), and only if the schema has a
feature of that name: the columns that nobody asks for need not be in the file.

Shapes: N rows of a log, U users, V videos, L tags of all videos together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.data.csv_columns import numbers, text_blocks
from trainer.errors import DataError
from trainer.stream.columns import Jagged

Ints = npt.NDArray[np.int64]

ACTIVE_DEGREES = (
    "full_active",
    "high_active",
    "middle_active",
    "low_active",
    "single_low_active",
    "30day_retention",
    "2_14_day_new",
    "day_new",
    "UNKNOWN",
)
"""As published; the id is the place here + 1, and 0 for any other word."""

USER_WORDS = (
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{index}" for index in range(18)),
)
VIDEO_WORDS = ("video_type", "upload_type", "music_id", "music_type")
WORD_ID_BITS = 52


@dataclass(frozen=True, slots=True)
class UserTable:
    """Sorted by user id."""

    user_ids_U: Ints
    active_degree_U: Ints
    register_days_U: npt.NDArray[np.float32]
    words: dict[str, Ints]
    """Ids [U] of the columns of USER_WORDS that were asked for."""

    def word(self, name: str, user_ids_N: Ints) -> Ints:
        """int64 [N]; 0 where the user is not known or the field is empty."""
        return _word(self.words, name, self.user_ids_U, user_ids_N)

    def active_degree(self, user_ids_N: Ints) -> Ints:
        """int64 [N]; 0 where the user is not known."""
        row_N, known_N = _find(self.user_ids_U, user_ids_N)
        degree_N: Ints = np.where(known_N, self.active_degree_U[row_N], 0)
        return degree_N

    def register_days(self, user_ids_N: Ints) -> npt.NDArray[np.float32]:
        """float32 [N]; NaN where the user is not known."""
        row_N, known_N = _find(self.user_ids_U, user_ids_N)
        return np.where(known_N, self.register_days_U[row_N], np.nan).astype(np.float32)


@dataclass(frozen=True, slots=True)
class VideoTable:
    """Sorted by video id; video v owns tags_L[tag_start_V[v] : tag_start_V[v] + num_tags_V[v]]."""

    video_ids_V: Ints
    author_ids_V: Ints
    num_tags_V: npt.NDArray[np.int32]
    tag_start_V: Ints
    tags_L: Ints
    words: dict[str, Ints]
    """Ids [V] of the columns of VIDEO_WORDS that were asked for."""

    def word(self, name: str, video_ids_N: Ints) -> Ints:
        """int64 [N]; 0 where the video is not known or the field is empty."""
        return _word(self.words, name, self.video_ids_V, video_ids_N)

    def author(self, video_ids_N: Ints) -> Ints:
        """int64 [N]; 0 where the video is not known."""
        row_N, known_N = _find(self.video_ids_V, video_ids_N)
        author_N: Ints = np.where(known_N, self.author_ids_V[row_N], 0)
        return author_N

    def tags(self, video_ids_N: Ints) -> Jagged:
        """No tags where the video is not known."""
        row_N, known_N = _find(self.video_ids_V, video_ids_N)
        lengths_N = np.where(known_N, self.num_tags_V[row_N], 0).astype(np.int32)
        first_N = np.cumsum(lengths_N) - lengths_N
        place_L = np.arange(lengths_N.sum()) + np.repeat(self.tag_start_V[row_N] - first_N, lengths_N)
        return Jagged(self.tags_L[place_L], lengths_N)


def no_users() -> UserTable:
    """A table of one row that no user has, for logs without user features."""
    return UserTable(np.array([-1]), np.zeros(1, np.int64), np.full(1, np.nan, np.float32), {})


def no_videos() -> VideoTable:
    """A table of one row that no video has, for logs without video features."""
    zero = np.zeros(1, np.int64)
    return VideoTable(np.array([-1]), zero, np.zeros(1, np.int32), zero, np.zeros(0, np.int64), {})


def read_users(path: Path, *, words: Sequence[str] = ()) -> UserTable:
    """user_features_*.csv. Args: words: those of USER_WORDS that are wanted. Raises: DataError."""
    ids, degrees, days = [], [], []
    degree_ids = {name: index + 1 for index, name in enumerate(ACTIVE_DEGREES)}
    of_words = _WordColumns(words)
    for line, (user, degree, register, *texts) in text_blocks(
        path, ("user_id", "user_active_degree", "register_days", *words)
    ):
        ids.append(numbers(path, "user_id", user, first_line=line, whole=True).astype(np.int64))
        degrees.append(np.array([degree_ids.get(name, 0) for name in degree], np.int64))
        days.append(_optional(path, "register_days", register, first_line=line).astype(np.float32))
        of_words.add(texts)
    if not ids:
        return no_users()
    user_ids_U = np.concatenate(ids)
    order_U = np.argsort(user_ids_U, kind="stable")
    return UserTable(
        user_ids_U[order_U],
        np.concatenate(degrees)[order_U],
        np.concatenate(days)[order_U],
        of_words.ordered(order_U),
    )


def read_videos(path: Path, *, words: Sequence[str] = ()) -> VideoTable:
    """video_features_basic_*.csv: author_id, and tag as numbers with commas between.

    Args: words: those of VIDEO_WORDS that are wanted. Raises: DataError.
    """
    ids, authors, lengths = [], [], []
    tags: list[int] = []
    of_words = _WordColumns(words)
    for line, (video, author, tag, *texts) in text_blocks(path, ("video_id", "author_id", "tag", *words)):
        ids.append(numbers(path, "video_id", video, first_line=line, whole=True).astype(np.int64))
        author_N = _optional(path, "author_id", author, first_line=line)
        authors.append(np.nan_to_num(author_N, nan=0.0).astype(np.int64))
        before = len(tags)
        ends = np.array([_add_tags(path, line + index, text, tags) for index, text in enumerate(tag)])
        lengths.append(np.diff(np.r_[before, ends]).astype(np.int32))
        of_words.add(texts)
    if not ids:
        return no_videos()
    video_ids_V, num_tags_V = np.concatenate(ids), np.concatenate(lengths)
    tag_start_V = np.cumsum(num_tags_V, dtype=np.int64) - num_tags_V
    order_V = np.argsort(video_ids_V, kind="stable")
    return VideoTable(
        video_ids_V[order_V],
        np.concatenate(authors)[order_V],
        num_tags_V[order_V],
        tag_start_V[order_V],
        np.array(tags, np.int64),
        of_words.ordered(order_V),
    )


def word_id(text: str) -> int:
    """0 for an empty field, else 52 bits that depend on the word alone: no dictionary has to be kept.

    Numbers are taken by value: a column with an empty field is written as 1.0 where another edition has 1.
    """
    word = text.strip()
    if word in ("", "nan"):
        return 0
    word = word.removesuffix(".0")
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - WORD_ID_BITS) or 1


class _WordColumns:
    """Ids of words, gathered block by block."""

    def __init__(self, names: Sequence[str]) -> None:
        self._blocks: dict[str, list[Ints]] = {name: [] for name in names}

    def add(self, texts: Sequence[Sequence[str]]) -> None:
        for blocks, column in zip(self._blocks.values(), texts, strict=True):
            ids = {text: word_id(text) for text in set(column)}
            blocks.append(np.array([ids[text] for text in column], np.int64))

    def ordered(self, order_N: Ints) -> dict[str, Ints]:
        return {name: np.concatenate(blocks)[order_N] for name, blocks in self._blocks.items()}


def _word(words: dict[str, Ints], name: str, ids: Ints, wanted_N: Ints) -> Ints:
    if name not in words:
        return np.zeros(len(wanted_N), np.int64)
    row_N, known_N = _find(ids, wanted_N)
    word_N: Ints = np.where(known_N, words[name][row_N], 0)
    return word_N


def _add_tags(path: Path, line: int, text: str, tags: list[int]) -> int:
    """Returns: how many tags there are in all after this line's."""
    for part in text.split(","):
        word = part.strip()
        if word in ("", "nan"):
            continue
        try:
            tags.append(int(float(word)))
        except (ValueError, OverflowError):
            raise DataError(f"{path}, line {line}: column tag must hold numbers, found '{text}'") from None
    return len(tags)


def _optional(path: Path, name: str, column: tuple[str, ...], *, first_line: int) -> npt.NDArray[np.float64]:
    """Numbers in which an empty field is NaN."""
    empty_N = np.array([value in ("", "nan") for value in column])
    filled = ["0" if empty else value for value, empty in zip(column, empty_N, strict=True)]
    return np.where(empty_N, np.nan, numbers(path, name, filled, first_line=first_line))


def _find(sorted_ids: Ints, wanted_N: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Row of each wanted id, and whether it is there (the row is any row where it is not)."""
    row_N: Ints = np.minimum(np.searchsorted(sorted_ids, wanted_N), len(sorted_ids) - 1)
    return row_N, sorted_ids[row_N] == wanted_N
