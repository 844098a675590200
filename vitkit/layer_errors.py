"""Where in a model errors come from: every layer's output against a float64 run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from vitkit._numerics import parity
from vitkit._switch import Switch, widened


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
    """Errors of the modules around whatever has kernels, in the order in which they end.

    Errors are those of the whole run up to a layer: a layer inherits what its input brings. The
    model runs in the mode it is in, without gradients, and must be unpatched; see
    ``vitkit.verify``.
    """
    switch = Switch(model, backend)
    names = switch.places()
    try:
        with torch.no_grad():
            switch.off()
            eager = _outputs(model, names, inputs, kwargs)
            exact = _outputs(copy.deepcopy(model).double(), names, *widened((inputs, kwargs)))
            switch.on()
            patched = _outputs(model, names, inputs, kwargs)
    finally:
        switch.restore()
    errors = []
    for name, truth in exact.items():
        if name not in patched or patched[name].shape != truth.shape:
            continue  # computed by a module around it
        result = parity(patched[name], eager[name], truth, terms=terms)
        scale = result.scale or 1.0
        found = (result.eager_max_error, result.max_error, result.max_limit)
        errors.append(LayerError(name, *(value / scale for value in found)))
    return errors


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
