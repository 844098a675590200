"""The plots of the report: curves, roofline, memory and error. Narrow enough for a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from vitkit import _drawing
from vitkit._drawing import AFTER, BAD, BEFORE, INK, LINE

from .harness import Row

WIDTH, HEIGHT = 4.6, 3.2  # inches


class Plot(NamedTuple):
    title: str
    note: str
    svg: str


def all_plots(facts: dict[str, Any], rows: Sequence[Row]) -> list[Plot]:
    """Those that the rows give."""
    found = []
    for op, curve in dict.fromkeys((r.op, r.curve) for r in rows if r.curve):
        for dtype in dict.fromkeys(r.dtype for r in rows if (r.op, r.curve) == (op, curve)):
            points = [r for r in rows if (r.op, r.curve, r.dtype) == (op, curve, dtype)]
            if len(points) > 1:
                found += _curves(op, curve, dtype, sorted(points, key=lambda r: r.size))
    measured = [r for r in rows if not r.modelled]
    if measured:
        found.append(_roofline(facts, measured))
        found.append(_memory(measured))
        for dtype in dict.fromkeys(r.dtype for r in measured):
            found.append(_errors(dtype, [r for r in measured if r.dtype == dtype]))
    return found


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def _short(size: float) -> str:
    """``16k`` of 16,384: as a tick of an axis."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{size / unit:.0f}{name}"
    return f"{size:.0f}"


def _curves(op: str, curve: str, dtype: str, points: Sequence[Row]) -> list[Plot]:
    """Time and memory against size: vitkit's, the best rival's, and what was modelled."""
    what = f"{op}, {dtype}, forward"
    plots = []
    for name, unit, mine, rival in (
        ("time", "milliseconds", lambda r: r.microseconds / 1e3,
         lambda r: r.rivals.get(r.best_rival, math.nan) / 1e3),
        ("peak memory", "MiB beyond the inputs", lambda r: r.peak_mbytes,
         lambda r: r.best_rival_peak_mbytes),
    ):  # fmt: skip
        drawn, axes = _drawing.figure(WIDTH, HEIGHT)
        measured = [p for p in points if not p.modelled]
        guessed = [p for p in points if p.modelled]
        sizes = [p.size for p in measured]
        style = {"marker": "o", "markersize": 4}
        axes.plot(sizes, [rival(p) for p in measured], color=BEFORE, label="best rival", **style)
        axes.plot(sizes, [mine(p) for p in measured], color=AFTER, label="vitkit", **style)
        if guessed:
            tail = [measured[-1], *guessed]
            axes.plot(
                [p.size for p in tail], [mine(p) for p in tail], color=AFTER, linestyle=":",
                marker="o", markerfacecolor="none", markersize=4, label="vitkit, modelled",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=curve, ylabel=unit)
        axes.set_xticks([p.size for p in points], [_short(p.size) for p in points], minor=False)
        axes.set_xticks([], minor=True)
        _legend(axes)
        rivals = ", ".join(dict.fromkeys(p.best_rival for p in measured))
        plots.append(
            Plot(f"{what}: {name}", f"best rival: {rivals}", _drawing.svg(drawn, f"{what}: {name}"))
        )
    return plots


def _roofline(facts: dict[str, Any], rows: Sequence[Row]) -> Plot:
    drawn, axes = _drawing.figure(WIDTH, HEIGHT)
    intensity = [r.gflops / r.gbytes for r in rows]
    ends = (min(intensity) / 2, max(intensity) * 2)
    bandwidth = facts["copy_gbytes"]
    # A dtype without a fast product of its own may be computed in float32.
    least = facts["gemm_gflops"]["float32"]
    for name, peak in sorted(facts["gemm_gflops"].items(), key=lambda item: item[1]):
        if peak < least:
            continue
        ridge = peak / bandwidth
        line = [ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]]
        axes.plot(line, [min(peak, bandwidth * x) for x in line], color=LINE, linewidth=1.5)
        axes.annotate(f"{name} {peak:.0f}", (ends[1], min(peak, bandwidth * ends[1])),
                      ha="right", va="bottom", color=INK, fontsize=8)  # fmt: skip
    axes.scatter(
        intensity, [r.gflops * r.microseconds / r.rivals[r.best_rival] for r in rows],
        s=14, color=BEFORE, label="best rival",
    )  # fmt: skip
    axes.scatter(intensity, [r.gflops for r in rows], s=14, color=AFTER, label="vitkit")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    _legend(axes)
    note = f"lines: torch.mm per dtype and {bandwidth:.0f} GB/s of a copy, measured in the same run"
    return Plot("Roofline", note, _drawing.svg(drawn, "roofline"))


def _memory(rows: Sequence[Row]) -> Plot:
    drawn, axes = _drawing.figure(WIDTH, HEIGHT)
    least = 1e-3
    pairs = [(max(r.best_rival_peak_mbytes, least), max(r.peak_mbytes, least)) for r in rows]
    ends = (min(min(p) for p in pairs) / 1.5, max(max(p) for p in pairs) * 1.5)
    axes.plot(ends, ends, color=LINE, linewidth=1.5)
    for x, y in pairs:
        axes.scatter([x], [y], s=14, color=AFTER if y <= 1.02 * x else BAD)
    axes.set(xscale="log", yscale="log", xlabel="best rival, MiB", ylabel="vitkit, MiB")
    note = "peak of one call beyond its inputs; below the line vitkit needs less than its rival"
    return Plot("Memory", note, _drawing.svg(drawn, "peak memory"))


def _errors(dtype: str, rows: Sequence[Row]) -> Plot:
    ops = list(dict.fromkeys(r.op for r in rows))
    drawn, axes = _drawing.figure(WIDTH, 0.9 + 0.32 * len(ops))
    series = (
        (BEFORE, "o", "eager", lambda r: r.eager_error),
        (AFTER, "D", "vitkit", lambda r: r.max_error),
        (INK, "|", "limit", lambda r: r.error_limit),
    )
    for colour, marker, label, value in series:
        axes.plot(
            [max(value(r) / (r.scale or 1.0), 1e-9) for r in rows], [ops.index(r.op) for r in rows],
            marker, color=colour, markersize=4 if marker != "|" else 8, label=label, alpha=0.8,
        )  # fmt: skip
    axes.set_yticks(range(len(ops)), ops)
    axes.set(xscale="log", ylim=(len(ops) - 0.5, -0.5))
    axes.set_xlabel("largest error / largest output")
    axes.legend(
        frameon=False, labelcolor=INK, fontsize=8, ncols=3, loc="lower center",
        bbox_to_anchor=(0.4, 1.0),
    )  # fmt: skip
    note = "limit: twice eager's error plus the rounding of the dtype; a row beyond it is not timed"
    return Plot(f"Error, {dtype}", note, _drawing.svg(drawn, f"errors in {dtype}"))
