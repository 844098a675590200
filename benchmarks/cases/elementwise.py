"""What the cases of ops of one pass share: they differ in function, inputs and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..harness import Case, Outputs, Provider, compiled

DTYPES = (torch.float32, torch.bfloat16)


def make_case(
    op: str,
    name: str,
    layout: str,
    shape: str,
    dtype: torch.dtype,
    backward: bool,
    inputs: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]],
    ours: Callable[..., Sequence[torch.Tensor]],
    eager: Callable[..., Sequence[torch.Tensor]],
    *,
    elements: tuple[int, int],
    flops: float,
    terms: int = 1,
    target: float | None = None,
    sets: tuple[str, ...] = ("full",),
    rivals: Mapping[str, Callable[..., Sequence[torch.Tensor]]] | None = None,
) -> Case:
    """One case. ``inputs()`` returns (differentiated, fixed) arguments of ``ours`` and of
    ``eager``, the host's own code; ``elements`` counts those read and written by the forward and
    by the backward pass, ``flops`` is that of the forward pass; ``rivals`` are raced beside
    ``eager`` and its compiled forms."""

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        torch.manual_seed(0)
        given, fixed = inputs()
        with torch.no_grad():
            grads = [torch.randn_like(t) for t in eager(*given, *fixed)]

        def bind(
            function: Callable[..., Sequence[torch.Tensor]], double: bool = False
        ) -> Callable[[], Outputs]:
            tensors = [t.double() if double else t for t in given]
            others = [t.double() if double else t for t in fixed]
            if not backward:
                return lambda: list(function(*tensors, *others))
            leaves = [t.detach().requires_grad_() for t in tensors]
            cotangents = [g.double() if double else g for g in grads]

            def call() -> Outputs:
                found = function(*leaves, *others)
                wanted = torch.autograd.grad(found, leaves, cotangents)
                return [*(t.detach() for t in found), *wanted]

            return call

        providers = [
            Provider("vitkit", bind(ours), ours=True),
            Provider("eager", bind(eager)),
            *(Provider(n, bind(f)) for n, f in {**compiled(eager), **(rivals or {})}.items()),
        ]
        return providers, bind(eager, double=True)

    forward, both = elements[0], sum(elements)
    return Case(
        op,
        name,
        "forward+backward" if backward else "forward",
        dtype,
        layout,
        shape,
        make,
        flops * (3 if backward else 1),
        float((both if backward else forward) * dtype.itemsize),
        terms,
        target,
        sets,
    )
