"""Configuration of the synchronisation rules: which changed rows reach serving, and when."""

from __future__ import annotations

import msgspec

DAY_S = 86_400
CLASS_ID_MAX = 4095


class RowRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rules of the rows of one table or feature class; docs/rules.md has the truth table.

    The defaults send every changed row at each publish. Source of the readings: PEPNet
    (arXiv 2302.01115) and retellings of it; of the scores: Paddle's CTR accessor.
    """

    update_limit: int = 0
    """At most this many pushes of one id within `update_limit_window_s`; 0 = no limit."""
    update_limit_window_s: int = 60
    """From the first of these pushes on."""
    min_updates: int = 1
    """Expiration, reading (a): a change is sent once it has gathered this many updates ..."""
    min_updates_window_s: int = 0
    """... within this time; a change that has not is not sent and starts to gather anew. 0 = no end."""
    refresh_after_s: int = 0
    """Expiration, reading (b): a changed row whose serving value is older than this is sent even if
    few updates, or little score, gathered; 0 = never."""
    min_gathered_score: float = 0.0
    """A row goes once the score that it gathered since its last push reaches this; 0 = any."""
    min_score: float = 0.0
    """A row whose score is below this is not worth serving; 0 = any."""
    unseen_max_s: int = 0
    """A row that was not seen for longer than this is not sent; 0 = however long."""

    def __post_init__(self) -> None:
        for name in (
            "update_limit",
            "update_limit_window_s",
            "min_updates_window_s",
            "refresh_after_s",
            "min_gathered_score",
            "min_score",
            "unseen_max_s",
        ):
            value = getattr(self, name)
            if not 0 <= value < 2**62:
                raise ValueError(f"{name} must not be negative, found {value}")
        if self.min_updates < 1:
            raise ValueError(f"min_updates must be at least 1, found {self.min_updates}")
        if self.update_limit and not self.update_limit_window_s:
            raise ValueError("update_limit needs update_limit_window_s above 0")


class RulesConfig(RowRules, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rules for delta versions; a full version ignores them, a delete always passes.

    A row follows the rules of its feature class if there are some, else of its table, else these. A
    table's or class's rules stand alone: what they leave out has its default, not the value here.
    """

    by_table: dict[str, RowRules] = {}
    """Table name -> its rules."""
    by_class: dict[str, RowRules] = {}
    """Feature class, "0" .. "4095" -> its rules, in whatever table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.by_class:
            if not (name.isascii() and name.isdigit() and str(int(name)) == name) or int(name) > CLASS_ID_MAX:
                raise ValueError(f"by_class: a feature class is 0..{CLASS_ID_MAX}, found '{name}'")

    @property
    def all_rules(self) -> tuple[RowRules, ...]:
        return (self, *self.by_table.values(), *self.by_class.values())

    @property
    def needs_keys(self) -> bool:
        """The caller must pass the rows' keys: rules differ by feature class."""
        return bool(self.by_class)

    @property
    def needs_scores(self) -> bool:
        """The caller must pass `score_N` and `gathered_score_N`."""
        return any(rules.min_score or rules.min_gathered_score for rules in self.all_rules)

    @property
    def needs_last_seen(self) -> bool:
        """The caller must pass `last_seen_s_N`."""
        return any(rules.unseen_max_s for rules in self.all_rules)


RULES_PRESETS: dict[str, RulesConfig] = {
    "everything": RulesConfig(),
    # The number limit a feature: no id is synchronised over and over.
    "update_limit": RulesConfig(update_limit=20, update_limit_window_s=20),
    # Readings (a) and (b) together with the limit.
    "pepnet": RulesConfig(
        update_limit=3,
        update_limit_window_s=60,
        min_updates=3,
        min_updates_window_s=600,
        refresh_after_s=600,
    ),
    # The thresholds of Paddle's CTR accessor: base_threshold, delta_threshold, delta_keep_days.
    "paddle_ctr": RulesConfig(min_score=1.5, min_gathered_score=0.25, unseen_max_s=16 * DAY_S),
}
