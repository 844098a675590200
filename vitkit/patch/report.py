"""What a patch did, module by module."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """One module (or part of one) that runs on vitkit's kernels."""

    name: str
    cls: str
    by: str
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """One module that a kernel could have served, and why it was left alone."""

    name: str
    cls: str
    reason: str


@dataclass
class Report:
    """Result of ``vitkit.patch``: what was replaced and what was left, with reasons."""

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        verb = "would replace" if self.dry_run else "replaced"
        lines = [f"vitkit {verb} {len(self.replaced)} modules, left {len(self.skipped)}"]
        for (cls, by, note), names in _grouped(self.replaced, "cls", "by", "note").items():
            suffix = f" ({note})" if note else ""
            lines.append(f"  {len(names):>4} x {cls} -> {by}{suffix}: {_shown(names)}")
        for (cls, reason), names in _grouped(self.skipped, "cls", "reason").items():
            lines.append(f"  {len(names):>4} x {cls} left: {reason}: {_shown(names)}")
        return "\n".join(lines)


def _grouped(entries: list[Any], *keys: str) -> dict[tuple[str, ...], list[str]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        groups.setdefault(tuple(getattr(entry, k) for k in keys), []).append(entry.name)
    return groups


def _shown(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f", ... {names[-1]}" if len(names) > 2 else "")
