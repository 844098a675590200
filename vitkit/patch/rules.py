"""The vocabulary of patch rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Change:
    """One attribute of one object that a replacement sets; ``__class__`` is the usual one."""

    target: Any
    attribute: str
    value: Any


@dataclass(frozen=True)
class Replacement:
    """What a rule wants done to a module.

    Args:
        by: what runs instead, for the report.
        changes: attributes to set.
        covers: submodules that the replacement computes itself and that no other rule may touch.
        note: limits worth telling, such as "host forward when dropout is active".
    """

    by: str
    changes: tuple[Change, ...]
    covers: tuple[torch.nn.Module, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """``match`` names the modules a rule speaks for; ``plan`` returns a Replacement, or the reason
    there is none."""

    match: Callable[[torch.nn.Module], bool]
    plan: Callable[[torch.nn.Module], Replacement | str]


@dataclass
class Host:
    """A library whose modules vitkit knows. ``load`` imports its rules, and with them the library;
    it is called only when the library is loaded already."""

    library: str
    load: Callable[[], Iterable[Rule]]
    rules: list[Rule] | None = field(default=None, repr=False)


def swap_class(module: torch.nn.Module, twin: type) -> Change:
    """Gives ``module`` the class ``twin``, a subclass of its own that changes ``forward`` only."""
    assert issubclass(twin, type(module)), (twin, type(module))
    return Change(module, "__class__", twin)


def observed(*modules: torch.nn.Module | None) -> str | None:
    """The reason modules cannot be computed by their parent: somebody watches or replaced them."""
    for m in modules:
        if m is None:
            continue
        hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        if any(hooks):
            return f"its {type(m).__name__} has hooks, which a fused call would not run"
        if "forward" in m.__dict__:
            return f"the forward of its {type(m).__name__} was replaced on the instance"
    return None


def is_group_norm(module: Any) -> bool:
    """Exactly torch's GroupNorm: a subclass may compute something else."""
    return type(module) is torch.nn.GroupNorm
