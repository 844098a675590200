"""Lets ``import xformers.ops`` find vitkit's, on request."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

ALIASES = {
    "xformers.ops": "vitkit.compat.xformers",
    "xformers.ops.fmha": "vitkit.compat.xformers.fmha",
    "xformers.ops.fmha.attn_bias": "vitkit.compat.xformers.fmha.attn_bias",
}
_replaced: dict[str, types.ModuleType | None] = {}


def install(*, override: bool = False) -> None:
    """Puts modules named ``xformers`` into ``sys.modules`` that lead here; ``uninstall`` takes them
    out again.

    Args:
        override: also where xformers is installed; what was imported from it before stays its own.

    Raises:
        RuntimeError: xformers is installed, and ``override`` is not set.
    """
    if _replaced:
        return
    if not override and _is_installed():
        raise RuntimeError("xformers: it is installed; install(override=True) takes its place")
    package = types.ModuleType("xformers", "vitkit.compat.xformers under another name")
    package.__path__ = []  # type: ignore[attr-defined]
    package.__version__ = "0.0.35+vitkit"  # type: ignore[attr-defined]
    modules = {"xformers": package}
    modules |= {name: importlib.import_module(target) for name, target in ALIASES.items()}
    package.ops = modules["xformers.ops"]  # type: ignore[attr-defined]
    for name, module in modules.items():
        _replaced[name] = sys.modules.get(name)
        sys.modules[name] = module


def uninstall() -> None:
    """Takes back what ``install`` did; without it, does nothing."""
    for name, module in _replaced.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    _replaced.clear()


def _is_installed() -> bool:
    return "xformers" in sys.modules or importlib.util.find_spec("xformers") is not None
