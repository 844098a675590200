"""A patched model learns what an unpatched one learns."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_parity

import vitkit
from vitkit.benchmarks import convergence
from vitkit.verify import KernelCalls, longest_sum

pytest.importorskip("timm")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


@pytest.mark.parametrize("task", convergence.TASKS, ids=lambda t: t.name)
def test_loss_curves_agree(task):
    """Every step adds its own rounding and carries on that of the steps before: the yardstick is
    how far the unpatched run is from the same run in float64 by then, the terms are those of all
    steps."""
    exact = convergence.train(task, torch.float64, False)
    eager = convergence.train(task, torch.float32, False)
    with KernelCalls() as calls:
        patched = convergence.train(task, torch.float32, True)
    steps = convergence.STEPS
    assert calls.counts and all(sum(c.values()) % steps == 0 for c in calls.counts.values())
    assert any(name.endswith("_bwd") for name in calls.counts)
    terms = steps * longest_sum(task.make())
    assert_parity(task.name, patched, eager, exact, dtype=torch.float32, terms=terms)
    assert patched[-5:].mean() < 0.8 * patched[:5].mean(), "it learns"
    assert not patched.equal(eager), "the patched run is the unpatched one"


def test_the_plot_holds_every_curve():
    curves = {t.name: (torch.rand(5), torch.rand(5)) for t in convergence.TASKS}
    svg = convergence.draw(curves)
    assert all(f">{t.name}<" in svg for t in convergence.TASKS) and "var(--after)" in svg
    assert not vitkit.is_patched(convergence.TASKS[0].make())
