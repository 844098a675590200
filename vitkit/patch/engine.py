"""Walks a model, asks the rules, applies what they want, and remembers how to undo it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vitkit.patch.report import Replaced, Report, Skipped
from vitkit.patch.rules import Change, Host, Replacement, Rule

# Where an instance keeps what it was: attribute -> value before the patch.
_UNDO = "_vitkit_undo"
_MISSING = "<not there before vitkit.patch>"


def _rules_of(name: str) -> Any:
    return lambda: importlib.import_module(f"vitkit.patch.hosts.{name}").RULES


# Rules for a library's own modules before those for torch's, which serve any model.
HOSTS = [
    Host("timm", _rules_of("timm")),
    Host("diffusers", _rules_of("diffusers")),
    Host("torch", _rules_of("pytorch")),
]


def _loaded_rules() -> list[Rule]:
    """Rules of the host libraries this process has imported; a model of another cannot exist."""
    rules: list[Rule] = []
    for host in HOSTS:
        if host.library in sys.modules:
            if host.rules is None:
                host.rules = list(host.load())
            rules.extend(host.rules)
    return rules


def _overridden(module: torch.nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by another library?)"
    return None


def _lookalike(module: torch.nn.Module) -> str | None:
    """The reason to list a module no rule speaks for: it looks like what vitkit accelerates."""
    name = type(module).__name__
    if isinstance(module, torch.nn.GroupNorm) or name.endswith("Attention"):
        return f"no rule for {type(module).__module__.split('.')[0]}'s {name}"
    return None


def _plan(
    module: torch.nn.Module, rules: list[Rule], covered: set[int]
) -> Replacement | str | None:
    """What to do with one module: a replacement, the reason it is left, None if it is no
    concern."""
    if id(module) in covered or _UNDO in module.__dict__:
        return None
    rule = next((r for r in rules if r.match(module)), None)
    if rule is None:
        return _lookalike(module)
    return _overridden(module) or rule.plan(module)


def patch(
    model: torch.nn.Module,
    backend: str = "auto",
    strict: bool = False,
    dry_run: bool = False,
) -> Report:
    """Replaces the modules of ``model`` that vitkit has kernels for, in place.

    Args:
        model: a model of timm or diffusers, or any module holding some of theirs. Patch before
            ``torch.compile``, DDP and FSDP wrap it.
        backend: what the replaced modules run on; see ``vitkit.flash_attention``.
        strict: raise if anything that could have been replaced is left.
        dry_run: change nothing, only report.

    Returns:
        What was replaced and what was left, with reasons. A second patch replaces nothing.

    Raises:
        TypeError: model is not a module.
        ValueError: unknown backend, or ``strict`` and something was left (nothing is changed then).

    Example:
        >>> import torch, vitkit
        >>> vitkit.patch(torch.nn.Linear(2, 2)).replaced
        []
    """
    from vitkit import backends

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    if backend not in ("auto", *backends.BACKENDS):
        raise ValueError(
            f"patch: backend must be one of {('auto', *backends.BACKENDS)}, got {backend!r}"
        )
    report, rules = Report(dry_run=dry_run), _loaded_rules()
    covered: set[int] = set()
    changes: list[Change] = []
    for name, module in model.named_modules():
        found = _plan(module, rules, covered)
        if isinstance(found, Replacement):
            covered.update(id(m) for m in found.covers)
            changes.extend(found.changes)
            owners = (module, *found.covers)
            changes.extend(Change(owner, "vitkit_backend", backend) for owner in owners)
            report.replaced.append(Replaced(name, type(module).__name__, found.by, found.note))
        elif found is not None:
            report.skipped.append(Skipped(name, type(module).__name__, found))
    if strict and report.skipped:
        raise ValueError(f"patch: strict must leave nothing, but {report}")
    if not dry_run:
        for change in changes:
            _apply(change)
    return report


def _apply(change: Change) -> None:
    values = vars(change.target)
    undo = values.setdefault(_UNDO, {})
    if change.attribute == "__class__":
        before: Any = type(change.target)
    else:
        before = values.get(change.attribute, _MISSING)
    undo.setdefault(change.attribute, before)
    setattr(change.target, change.attribute, change.value)


def unpatch(model: torch.nn.Module) -> int:
    """Makes every module of ``model`` exactly what it was before ``patch``; returns how many were
    changed back. Copies and unpickled models can be unpatched too: the memory travels with them."""
    count = 0
    for module in model.modules():
        undo = module.__dict__.pop(_UNDO, None)
        if undo is None:
            continue
        count += 1
        for attribute, value in undo.items():
            if isinstance(value, str) and value == _MISSING:
                del module.__dict__[attribute]
            else:
                setattr(module, attribute, value)
    return count


def is_patched(model: torch.nn.Module) -> bool:
    """Whether any module of ``model`` runs on vitkit's kernels."""
    return any(_UNDO in module.__dict__ for module in model.modules())


@contextmanager
def patched(
    model: torch.nn.Module, backend: str = "auto", strict: bool = False
) -> Iterator[Report]:
    """``patch`` on entry, ``unpatch`` on exit, also after an exception."""
    if is_patched(model):
        raise ValueError("patched: model must not be patched already")
    report = patch(model, backend=backend, strict=strict)
    try:
        yield report
    finally:
        unpatch(model)
