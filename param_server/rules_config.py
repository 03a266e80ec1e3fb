"""Configuration of the synchronisation rules: which changed rows reach serving, and when."""

from __future__ import annotations

import msgspec


class RulesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rules for delta versions; a full version ignores them, a delete always passes.

    The defaults send every changed row at each publish. Source of the readings: PEPNet
    (arXiv 2302.01115) and retellings of it; docs/rules.md has the truth table.
    """

    update_limit: int = 0
    """At most this many pushes of one id within `update_limit_window_s`; 0 = no limit."""
    update_limit_window_s: int = 60
    min_updates: int = 1
    """Expiration, reading (a): a change is sent once it has gathered this many updates ..."""
    min_updates_window_s: int = 0
    """... within this time; a change that has not is not sent and starts to gather anew. 0 = no end."""
    refresh_after_s: int = 0
    """Expiration, reading (b): a changed row whose serving value is older than this is sent even if
    few updates gathered; 0 = never."""

    def __post_init__(self) -> None:
        for name in ("update_limit", "update_limit_window_s", "min_updates_window_s", "refresh_after_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        if self.min_updates < 1:
            raise ValueError(f"min_updates must be at least 1, found {self.min_updates}")
        if self.update_limit and not self.update_limit_window_s:
            raise ValueError("update_limit needs update_limit_window_s above 0")
