"""Where in a model errors come from: every layer's output against a float64 run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from vitkit._numerics import parity
from vitkit.patch import patch, unpatch


@dataclass(frozen=True)
class LayerError:
    """Largest errors of one layer's output, relative to its largest exact value.

    Attributes:
        name: path in the model.
        eager, patched: of the unpatched and the patched run.
        limit: what the project's rule allows the patched run.
    """

    name: str
    eager: float
    patched: float
    limit: float


def layer_errors(
    model: torch.nn.Module, *inputs: Any, backend: str = "auto", terms: int = 1, **kwargs: Any
) -> list[LayerError]:
    """Errors of the modules around whatever is replaced, in the order in which they run.

    A replaced module may compute its neighbour along with itself (a norm its activation), so that
    its own output has no counterpart; the output of the module around both has one.
    """
    found = patch(model, backend=backend, dry_run=True)
    names = {r.name.rpartition(".")[0] for r in found.replaced} - {""}
    double = copy.deepcopy(model).double()
    wide = tree_map(_double, (inputs, kwargs))
    with torch.no_grad():
        exact = _outputs(double, names, wide[0], wide[1])
        eager = _outputs(model, names, inputs, kwargs)
        patch(model, backend=backend)
        try:
            patched = _outputs(model, names, inputs, kwargs)
        finally:
            unpatch(model)
    errors = []
    for name, truth in exact.items():
        result = parity(patched[name], eager[name], truth, terms=terms)
        scale = result.scale or 1.0
        errors.append(
            LayerError(
                name, result.eager_max_error / scale, result.max_error / scale,
                result.max_limit / scale,
            )
        )  # fmt: skip
    return errors


def _double(t: Any) -> Any:
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def _outputs(
    model: torch.nn.Module, names: set[str], inputs: Any, kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """First floating tensor of each named module's first output."""
    found: dict[str, torch.Tensor] = {}
    with _watching(model, names, found):
        model(*inputs, **kwargs)
    return found


@contextmanager
def _watching(
    model: torch.nn.Module, names: set[str], found: dict[str, torch.Tensor]
) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
            floating = [t for t in tensors if t.is_floating_point()]
            if floating and name not in found:
                found[name] = floating[0].detach().clone()

        return hook

    modules = [(n, m) for n, m in model.named_modules() if n in names]
    handles = [m.register_forward_hook(keep(n)) for n, m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
