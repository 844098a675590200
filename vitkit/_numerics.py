"""The one rule for "same numbers", used by tests, benchmarks and ``vitkit.verify``.

    error <= 2 * eager_error + (eps_dtype + sqrt(terms) * eps_float32) * max |exact|

``exact`` is the float64 reference on inputs rounded to the dtype first, ``eager_error`` the error
of the same-dtype plain PyTorch computation. The rule holds in max norm and, with norms in place of
maxima, in relative L2: one bad row must not hide below a large maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Parity:
    """Errors of one tensor against float64-level truth, and the limits they must keep."""

    max_error: float
    max_limit: float
    l2_error: float
    l2_limit: float
    eager_max_error: float
    scale: float

    @property
    def ok(self) -> bool:
        return self.max_error <= self.max_limit and self.l2_error <= self.l2_limit

    @property
    def relative(self) -> float:
        """Max error over max |exact|."""
        return self.max_error / self.scale if self.scale else self.max_error

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO LARGE"
        return (
            f"max error {self.max_error:.3g} (limit {self.max_limit:.3g},"
            f" eager {self.eager_max_error:.3g}),"
            f" relative L2 {self.l2_error:.3g} (limit {self.l2_limit:.3g}): {verdict}"
        )


def parity(
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    terms: int = 1,
) -> Parity:
    """Measures ``actual`` and ``eager`` against ``exact``.

    Args:
        dtype: the dtype whose rounding is allowed, that of ``actual`` if None (a float32 result
            computed from bfloat16 intermediates names bfloat16).
        terms: number of terms summed for one element; the accumulation error allowed grows with its
            square root.

    Infinities and NaN must be where ``exact`` has them; otherwise the error is infinite.
    """
    dtype = dtype or actual.dtype
    if actual.shape != exact.shape:
        raise ValueError(
            f"parity: actual must have shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
        )
    if exact.numel() == 0:
        return Parity(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    exact = exact.detach().double()
    finite = exact.isfinite()
    truth = exact.where(finite, 0)
    scale, norm = truth.abs().max().item(), truth.norm().item()

    def errors(value: torch.Tensor) -> tuple[float, float]:
        value = value.detach().to(exact.device).double()
        same = torch.equal(value[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0))
        if not same or not value[finite].isfinite().all():
            return math.inf, math.inf
        difference = value.where(finite, 0) - truth
        return difference.abs().max().item(), difference.norm().item()

    allowed = torch.finfo(dtype).eps + math.sqrt(terms) * EPS32
    (max_error, l2), (eager_max, eager_l2) = errors(actual), errors(eager)
    relative = (lambda x: x / norm) if norm else (lambda x: x)
    return Parity(
        max_error=max_error,
        max_limit=2 * eager_max + allowed * scale,
        l2_error=relative(l2),
        l2_limit=relative(2 * eager_l2) + allowed,
        eager_max_error=eager_max,
        scale=scale,
    )
