"""The page of ``vitkit verify``: one self-contained file with the verdict, the tables and the error
of every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import torch

from vitkit import _drawing, doctor
from vitkit._drawing import AFTER, BEFORE, INK, LINE
from vitkit._version import __version__
from vitkit.layer_errors import LayerError
from vitkit.verification import Verification

if TYPE_CHECKING:
    from vitkit.verify_command import Asked

SHOWN_GRADIENTS = 12


def render(asked: Asked, result: Verification, layers: Sequence[LayerError], shapes: str) -> str:
    """HTML of the page; the plot is inline SVG that follows the page's light or dark colours."""
    import jinja2

    source = files("vitkit").joinpath("verify_page.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    where = torch.cuda.get_device_name() if asked.device == "cuda" else doctor.cpu_name()
    gradients = sorted(result.gradients, key=lambda g: -g.closeness)
    slowest = max((t.seconds for t in result.timings.values()), default=1.0)
    return environment.from_string(source).render(
        asked=asked,
        r=result,
        shapes=shapes,
        where=where,
        threads=torch.get_num_threads() if asked.device == "cpu" else None,
        versions=f"vitkit {__version__}, torch {torch.__version__}",
        groups=[(len(names), cls, fate, names) for cls, fate, names in result.report.groups()],
        gradients=gradients[:SHOWN_GRADIENTS],
        slowest=slowest,
        layers=layers,
        plot=_plot(layers) if layers else None,
    )


def _plot(layers: Sequence[LayerError]) -> str:
    """A row per layer in the order of the run, from top to bottom."""
    drawn, axes = _drawing.figure(6.0, 1.1 + 0.2 * len(layers))
    rows = range(len(layers))
    floor = 1e-10
    series = (
        ([e.limit for e in layers], "|", INK, "limit", 9),
        ([e.eager for e in layers], "o", BEFORE, "unpatched", 7),
        ([e.patched for e in layers], "D", AFTER, "patched", 4),
    )
    for e, row in zip(layers, rows, strict=True):
        axes.plot([max(e.patched, floor), max(e.limit, floor)], [row, row], color=LINE, zorder=0)
    for values, marker, colour, label, size in series:
        at = [max(v, floor) for v in values]
        axes.plot(at, rows, marker, color=colour, label=label, markersize=size)
    axes.set_yticks(rows, [e.name for e in layers], fontsize=8)
    shown = [max(v, floor) for e in layers for v in (e.limit, e.eager, e.patched)]
    decades = (math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown))))
    axes.set(
        xscale="log",
        ylim=(len(layers) - 0.5, -0.5),
        xlim=[0.9 * 10.0 ** decades[0], 1.1 * 10.0 ** decades[1]],
    )
    axes.set_xticks([10.0**d for d in range(decades[0], decades[1] + 1)])
    axes.xaxis.set_minor_formatter("")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", left=False)
    axes.set_xlabel("largest error / largest value of the layer")
    drawn.legend(frameon=False, labelcolor=INK, ncols=3, loc="outside upper center")
    return _drawing.svg(drawn, "error of every layer against float64, unpatched and patched")
