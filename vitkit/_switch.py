"""A model with vitkit's kernels and the same model without them, by turns."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch

from vitkit.nn import convolution, products
from vitkit.patch import Report, patch, unpatch


class Switch:
    """Turns a model's kernels on and off.

    Off is the model unpatched, its modules of vitkit's own (those of :mod:`vitkit.nn` and
    :mod:`vitkit.models`) on backend ``reference``; on is the model patched, those modules on
    ``backend``.

    Attributes:
        report: what patching replaces.
        own: modules of vitkit's own that have kernels, by class: how many.
    """

    def __init__(self, model: torch.nn.Module, backend: str) -> None:
        self.model, self.backend = model, backend
        self.report: Report = patch(model, backend=backend, dry_run=True)
        modules = [m for m in model.modules() if _is_of(m, "vitkit.")]
        self._before = [(m, m.__dict__.get("vitkit_backend")) for m in modules]
        self.own = dict(Counter(type(m).__name__ for m in modules if _has_kernels(m)))

    def off(self) -> None:
        unpatch(self.model)
        for module, _ in self._before:
            module.__dict__["vitkit_backend"] = "reference"

    def on(self) -> Report:
        self.restore()
        if self.backend != "auto":
            for module, _ in self._before:
                module.__dict__["vitkit_backend"] = self.backend
        return patch(self.model, backend=self.backend)

    def restore(self) -> None:
        """The model as it was found."""
        unpatch(self.model)
        for module, backend in self._before:
            if backend is None:
                module.__dict__.pop("vitkit_backend", None)
            else:
                module.__dict__["vitkit_backend"] = backend

    def places(self) -> set[str]:
        """Paths of the modules around whatever has kernels: a module may compute its neighbour
        along with itself (a norm its activation), so that its own output has no counterpart."""
        own = {id(m) for m, _ in self._before if _has_kernels(m)}
        named = ((n, m) for n, m in self.model.named_modules() if id(m) in own)
        names = itertools.chain((r.name for r in self.report.replaced), (n for n, _ in named))
        return {n.rpartition(".")[0] for n in names} - {""}


def _is_of(module: torch.nn.Module, package: str) -> bool:
    """Whether its class, or one it is derived from, is of that package."""
    return any(cls.__module__.startswith(package) for cls in type(module).__mro__)


def _has_kernels(module: torch.nn.Module) -> bool:
    if isinstance(module, products.Linear | convolution._Convolution):
        where = module.weight.dtype, module.weight.device.type
        kernel = isinstance(module, products.Linear) and products.has_kernel(*where)
        return kernel or convolution.has_kernel(module) or products.products_are_slow(*where)
    return _is_of(module, "vitkit.nn.")


def widened(values: Any) -> Any:
    """Floating tensors among ``values`` in float64."""

    def one(t: Any) -> Any:
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return torch.utils._pytree.tree_map(one, values)
