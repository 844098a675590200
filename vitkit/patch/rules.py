"""The vocabulary of patch rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vitkit.nn.products import watched as watched
from vitkit.patch.source import unknown


@dataclass(frozen=True)
class Change:
    """One attribute of one module that a replacement sets; ``__class__`` is the usual one."""

    target: torch.nn.Module
    attribute: str
    value: Any


@dataclass(frozen=True)
class Replacement:
    """What a rule wants done to a module.

    Args:
        by: what runs instead, for the report.
        changes: attributes to set.
        covers: submodules that the replacement computes itself and that no other rule may touch.
        note: limits worth telling, such as "timm's forward while dropout is active".
    """

    by: str
    changes: tuple[Change, ...]
    covers: tuple[torch.nn.Module, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """What to do with modules of one class.

    Args:
        cls: the class, exactly: a subclass may compute something else and is left with that reason.
        op: the vitkit op the replacement needs, None if it needs none.
        plan: takes such a module, returns a Replacement, the reason there is none, or None if the
            module is of no concern after all.
        repeats: the host's functions whose computation the replacement repeats, each with the
            fingerprints it was written for and the host versions that have them.
        applies: which modules the rule is for, where it is not those of exactly one class.
    """

    cls: type
    op: str | None
    plan: Callable[[Any], Replacement | str | None]
    repeats: tuple[tuple[Callable[..., Any], dict[str, str]], ...] = ()
    applies: Callable[[torch.nn.Module], bool] | None = None

    def matches(self, module: torch.nn.Module) -> bool:
        return type(module) is self.cls if self.applies is None else self.applies(module)

    def why_not(self) -> str | None:
        """The reason this rule does not fit the installed version of its host."""
        return next((r for f, known in self.repeats if (r := unknown(f, known))), None)


def swap_class(module: torch.nn.Module, twin: type) -> Change:
    """Gives ``module`` the class ``twin``, a subclass of its own that changes ``forward`` only."""
    assert issubclass(twin, type(module)), (twin, type(module))
    return Change(module, "__class__", twin)


def is_group_norm(module: Any) -> bool:
    """Exactly torch's GroupNorm: a subclass may compute something else."""
    return type(module) is torch.nn.GroupNorm
