"""What a patch did, module by module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


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
    """Result of ``vitkit.patch``. ``print(report)`` lists it by kind; rich prints a table.

    Attributes:
        backend: as asked for.
        replaced, skipped: modules by their path in the model; ``""`` is the model itself.
        already: modules an earlier patch had changed; they were left as they are.
        dry_run: whether nothing was changed.
    """

    backend: str = "auto"
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    already: int = 0
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def headline(self) -> str:
        verb = "would replace" if self.dry_run else "replaced"
        count = len(self.replaced)
        text = f"vitkit {verb} {count} module{'' if count == 1 else 's'}, left {len(self.skipped)}"
        return text + (f"; {self.already} were patched before" if self.already else "")

    def groups(self) -> Iterable[tuple[str, str, list[str]]]:
        """(class, what became of it, names) of modules alike in both."""
        found: dict[tuple[str, str], list[str]] = {}
        for r in self.replaced:
            note = f" ({r.note})" if r.note else ""
            found.setdefault((r.cls, f"-> {r.by}{note}"), []).append(r.name)
        for s in self.skipped:
            found.setdefault((s.cls, f"left: {s.reason}"), []).append(s.name)
        return ((cls, fate, names) for (cls, fate), names in found.items())

    def __str__(self) -> str:
        lines = [
            f"{len(names):>6} x {cls} {fate}: {_shown(names)}" for cls, fate, names in self.groups()
        ]
        return "\n".join([self.headline, *lines])

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.headline, title_justify="left", box=box.SIMPLE)
        table.add_column("", justify="right")
        for column in ("class", "fate", "where"):
            table.add_column(column)
        for cls, fate, names in self.groups():
            style = "yellow" if fate.startswith("left") else "green"
            cells = (Text(str(len(names))), Text(cls), Text(fate, style), Text(_shown(names)))
            table.add_row(*cells)
        return table


def _shown(names: list[str]) -> str:
    named = [n or "the model itself" for n in names]
    return ", ".join(named[:2]) + (f" ... {named[-1]}" if len(named) > 2 else "")
