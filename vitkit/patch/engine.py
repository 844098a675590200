"""Walks a model, asks the rules, applies what they want, and remembers how to undo it."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from vitkit import backends
from vitkit.nn import why_no_kernel
from vitkit.patch.report import Replaced, Report, Skipped
from vitkit.patch.rules import Change, Replacement, Rule

# Host library -> module with its rules; torch's last: they serve whatever no host rule speaks for.
HOSTS = {
    "timm": "timm",
    "diffusers": "diffusers",
    "torchvision": "torchvision",
    # Importing transformers alone imports no model, as diffusers does: its rules would.
    "transformers.modeling_utils": "transformers",
    "torch": "pytorch",
}

# Where an instance keeps what it was: attribute -> value before the patch.
_UNDO = "_vitkit_undo"
_MISSING = "<not there before vitkit.patch>"


@cache
def _rules_of(host: str) -> tuple[Rule, ...] | str:
    """The rules for a host, or why they cannot be loaded (a version without some class)."""
    try:
        return tuple(importlib.import_module(f"vitkit.patch.hosts.{HOSTS[host]}").RULES)
    except (ImportError, AttributeError) as error:
        return f"the rules for {host} cannot be loaded: {error}"


def _rules() -> list[Rule]:
    """Rules of the host libraries this process has imported; modules of another cannot exist."""
    found = [_rules_of(host) for host in HOSTS if host in sys.modules]
    return [rule for rules in found if not isinstance(rules, str) for rule in rules]


def _why_untouchable(module: torch.nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by another library?)"
    return None


# What a class that vitkit could accelerate is called.
_KNOWN_BY_NAME = ("Attention", "ClassAttn", "HeadAttn", "ResnetBlock")
_ATTENTION = ("flash_attention", "window_attention")


def _holds_attention(module: torch.nn.Module, rules: list[Rule]) -> bool:
    """Whether the module only wraps attention that a rule speaks for."""
    attention = [rule for rule in rules if rule.op in _ATTENTION]
    return any(r.matches(m) for m in module.modules() if m is not module for r in attention)


def _why_no_rule(module: torch.nn.Module, rules: list[Rule]) -> str | None:
    """The reason to list a module no rule speaks for: it looks like what vitkit accelerates."""
    name = type(module).__name__
    host = type(module).__module__.split(".")[0]
    classes = [rule.cls for rule in rules if rule.applies is None]
    parent = next((cls for cls in classes if isinstance(module, cls)), None)
    if parent is not None:
        origin = parent.__module__.split(".")[0]
        return f"a subclass of {origin}'s {parent.__name__}: it may compute something else"
    if any(part in name for part in _KNOWN_BY_NAME) and not _holds_attention(module, rules):
        rules_of_host = _rules_of(host) if host in HOSTS else ()
        unloaded = rules_of_host if isinstance(rules_of_host, str) else None
        return unloaded or f"no rule for {host}'s {name}"
    return None


@dataclass(frozen=True)
class _Survey:
    """What judging a module takes besides the module."""

    rules: list[Rule]
    backend: str
    home: torch.nn.Module  # the model: a module without tensors is where its model is

    def why_no_kernel(self, module: torch.nn.Module, op: str) -> str | None:
        """The reason that no kernel serves the module where, and in the dtype in which, it is."""
        if self.backend != "auto" or backends.DEFAULT != "auto":
            return None
        sources = (module.parameters(), module.buffers(), self.home.parameters())
        tensors = (t for t in itertools.chain(*sources) if t.is_floating_point())
        first = next(tensors, None)
        return None if first is None else why_no_kernel(op, first.device.type, first.dtype)

    def plan(self, module: torch.nn.Module) -> Replacement | str | None:
        """A replacement, the reason the module is left, None if it is of no concern."""
        if type(module).__module__.split(".")[0] == "vitkit":
            return self._plan_own(module)
        rule = next((r for r in self.rules if r.matches(module)), None)
        if rule is None:
            return _why_no_rule(module, self.rules)
        reason = _why_untouchable(module) or rule.why_not()
        found = reason or rule.plan(module)
        if not isinstance(found, Replacement):
            return found
        reason = None if rule.op is None else self.why_no_kernel(module, rule.op)
        return reason or found

    def _plan_own(self, module: torch.nn.Module) -> Replacement | None:
        """A module of vitkit's own is on kernels already, unless it was made for another backend
        than the one asked for."""
        current = getattr(module, "vitkit_backend", "auto")
        if current == self.backend:
            return None
        return Replacement(f"backend {self.backend!r}", (), note=f"was on {current!r}")


def patch(
    model: torch.nn.Module,
    backend: str = "auto",
    strict: bool = False,
    dry_run: bool = False,
) -> Report:
    """Replaces the modules of ``model`` that vitkit has kernels for, in place.

    Parameters, buffers, hooks and state_dict keys stay; only classes of module instances change.
    Modules are judged as they are now: move the model to its device and dtype first, and patch
    before ``torch.compile``, DDP and FSDP wrap it.

    Args:
        model: a model of timm, transformers, diffusers, torchvision or ``vitkit.models``, or any
            module holding some of theirs or of torch's.
        backend: what the replaced modules run on; see ``vitkit.flash_attention``.
        strict: raise if anything that could have been replaced is left, or if there is nothing to
            replace.
        dry_run: change nothing, only report.

    Returns:
        What was replaced and what was left, with reasons. A second patch replaces nothing.

    Raises:
        TypeError: model is not a module.
        ValueError: unknown backend, or ``strict`` is not met (nothing is changed then).

    Example:
        >>> import torch, vitkit
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8))
        >>> print(vitkit.patch(model, backend="reference"))
        vitkit replaced 1 module, left 0
             1 x GroupNorm -> group_norm_silu (no activation): 1
        >>> vitkit.unpatch(model)
        1
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    allowed = ("auto", *backends.BACKENDS)
    if backend not in allowed:
        raise ValueError(f"patch: backend must be one of {allowed}, got {backend!r}")
    report, changes = _survey(model, backend)
    report.dry_run = dry_run
    if strict and (report.skipped or not (report.replaced or report.already)):
        raise ValueError(f"patch: strict must leave nothing, got\n{report}")
    if not dry_run:
        for change in changes:
            _apply(change)
    return report


def _survey(model: torch.nn.Module, backend: str) -> tuple[Report, list[Change]]:
    report, survey = Report(backend=backend), _Survey(_rules(), backend, model)
    changes: list[Change] = []
    covered: set[int] = set()
    for name, module in model.named_modules():
        if _UNDO in module.__dict__:
            report.already += 1
            continue
        if id(module) in covered:
            continue
        found = survey.plan(module)
        if isinstance(found, Replacement):
            covered.update(id(m) for m in found.covers)
            changes.extend(found.changes)
            owners = (module, *found.covers)
            changes.extend(Change(owner, "vitkit_backend", backend) for owner in owners)
            report.replaced.append(Replaced(name, type(module).__name__, found.by, found.note))
        elif found is not None:
            report.skipped.append(Skipped(name, type(module).__name__, found))
    return report, changes


def _apply(change: Change) -> None:
    values = vars(change.target)
    undo = values.setdefault(_UNDO, {})
    if change.attribute == "__class__":
        before: Any = (type(change.target), change.value)
    else:
        before = values.get(change.attribute, _MISSING)
    undo.setdefault(change.attribute, before)
    setattr(change.target, change.attribute, change.value)


def unpatch(model: torch.nn.Module) -> int:
    """Makes every module of ``model`` exactly what it was before ``patch``.

    Copies and unpickled models can be unpatched too: what a module was travels with it.

    Returns:
        The number of module instances changed back.

    Raises:
        ValueError: a module was given another class since (sharding does that); nothing is changed.
    """
    modules = [(name, m) for name, m in model.named_modules() if _UNDO in m.__dict__]
    for name, module in modules:
        given = module.__dict__[_UNDO].get("__class__", (None, type(module)))[1]
        if type(module) is not given:
            raise ValueError(
                f"unpatch: {name or 'model'} must have the class that patch gave it,"
                f" got {type(module).__module__}.{type(module).__name__}"
            )
    for _, module in modules:
        for attribute, before in module.__dict__.pop(_UNDO).items():
            if attribute == "__class__":
                module.__class__ = before[0]
            elif isinstance(before, str) and before == _MISSING:
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = before
    return len(modules)


def is_patched(model: torch.nn.Module) -> bool:
    """Whether any module of ``model`` runs on vitkit's kernels."""
    return any(_UNDO in module.__dict__ for module in model.modules())


@contextmanager
def patched(
    model: torch.nn.Module, backend: str = "auto", strict: bool = False
) -> Iterator[Report]:
    """``patch`` on entry, ``unpatch`` on exit, also after an exception.

    Raises:
        ValueError: the model is patched already: leaving would unpatch what was there before.
    """
    if isinstance(model, torch.nn.Module) and is_patched(model):
        raise ValueError("patched: model must not be patched already")
    report = patch(model, backend=backend, strict=strict)
    try:
        yield report
    finally:
        unpatch(model)
