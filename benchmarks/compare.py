"""Two runs of the same cases: what became slower, and whether that is more than noise.

Times of two runs differ with the machine and its neighbours. What is judged is the speed-up against
the best rival, whose times were taken in turns with ours: it changed if it moved by more than the
intervals of the four medians it comes from, and by at least ``LEAST``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .harness import Row

LEAST = 0.03


def _key(row: Row) -> tuple[str, ...]:
    return (row.op, row.name, row.mode, row.dtype, row.layout, row.shape)


def _noise(row: Row) -> float:
    """Relative half-width of the 20-80 % intervals of our time and the best rival's, together."""
    theirs = row.rivals[row.best_rival]
    pairs = ((row.interval, row.microseconds), (row.rival_interval, theirs))
    # Rows stored before intervals were have the interquartile range of our own times.
    halves = [
        row.spread / 2 if math.isnan(low) else (high - low) / 2 / median
        for (low, high), median in pairs
    ]
    return math.hypot(*halves)


@dataclass(frozen=True)
class Change:
    """One case in both runs."""

    old: Row
    new: Row

    @property
    def speedup(self) -> float:
        """New speed-up over old: below 1 is a regression."""
        return self.new.ratio / self.old.ratio

    @property
    def noise(self) -> float:
        return max(LEAST, math.hypot(_noise(self.old), _noise(self.new)))

    @property
    def verdict(self) -> str:
        if self.new.best_rival not in self.old.rivals:
            return "new rival"
        if self.speedup < 1 - self.noise:
            return "slower"
        return "faster" if self.speedup > 1 + self.noise else "same"


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Cases measured in both runs, the worst first."""
    before = {_key(r): r for r in old if not r.modelled}
    both = [Change(before[_key(r)], r) for r in new if not r.modelled and _key(r) in before]
    return sorted(both, key=lambda c: c.speedup)


def markdown(
    old_facts: dict[str, Any], old: Sequence[Row], facts: dict[str, Any], rows: Sequence[Row]
) -> str:
    """A table, regressions first."""
    found = changes(old, rows)
    worse = sum(c.verdict == "slower" for c in found)
    better = sum(c.verdict == "faster" for c in found)
    lines = [
        f"Against {old_facts['commit']} of {old_facts['date']} on {old_facts['device']}:"
        f" {len(found)} cases in both runs, {worse} slower, {better} faster,"
        f" {len(rows) - len(found)} without a counterpart.",
    ]
    if old_facts["device"] != facts["device"]:
        lines.append(f"This run is on another machine, {facts['device']}.")
    lines += [
        "",
        "| case | vitkit before | now | speed-up before | now | change | noise | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        o, n = c.old, c.new
        lines.append(
            f"| {n.op} {n.name} {n.mode} {n.dtype} {n.layout} | {o.microseconds:.0f} us"
            f" | {n.microseconds:.0f} us | {o.ratio:.2f}x | {n.ratio:.2f}x"
            f" | {c.speedup - 1:+.0%} | {c.noise:.0%} | {c.verdict} |"
        )
    return "\n".join(lines)
