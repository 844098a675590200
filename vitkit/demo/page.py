"""The demo's page: one self-contained file with the table, the plots and the photograph."""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from typing import Any

import torch

from vitkit import _drawing, doctor
from vitkit._drawing import AFTER, BEFORE, INK
from vitkit._version import __version__
from vitkit.verification import Verification

Row = tuple[str, Verification]


def render(rows: list[Row], photo: torch.Tensor, device: str, dtype: str) -> str:
    """HTML of the page; plots are inline SVG that follow the page's light or dark colours."""
    import jinja2

    source = files("vitkit.demo").joinpath("page.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    where = torch.cuda.get_device_name() if device == "cuda" else doctor.cpu_name()
    return environment.from_string(source).render(
        rows=rows,
        times=_bars(rows),
        errors=_errors(rows),
        photo=_png(photo),
        where=where,
        threads=torch.get_num_threads() if device == "cpu" else None,
        dtype=dtype,
        versions=f"vitkit {__version__}, torch {torch.__version__}",
        ok=all(r.ok for _, r in rows),
    )


def _png(photo: torch.Tensor) -> str:
    from PIL import Image

    pixels = ((photo[0] * 0.5 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _figure(height: float) -> tuple[Any, Any]:
    figure, axes = _drawing.figure(7.2, height)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return figure, axes


def _bars(rows: list[Row]) -> str:
    figure, axes = _figure(0.6 + 0.72 * len(rows))
    for i, (_, r) in enumerate(rows):
        before, after = r.seconds_before * 1e3, r.seconds_after * 1e3
        axes.barh(i - 0.19, before, 0.34, color=BEFORE, label="unpatched" if i == 0 else None)
        axes.barh(i + 0.19, after, 0.34, color=AFTER, label="patched" if i == 0 else None)
        axes.text(after, i + 0.19, f" {r.speedup:.2f}x", va="center", color=INK, weight="bold")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per call (median)")
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return _drawing.svg(figure, "milliseconds per call, unpatched and patched")


def _errors(rows: list[Row]) -> str:
    figure, axes = _figure(0.6 + 0.72 * len(rows))
    for i, (_, r) in enumerate(rows):
        worst = r.worst.parity
        scale = worst.scale or 1.0
        points = (
            (worst.eager_max_error, "o", BEFORE, "unpatched"),
            (worst.max_error, "D", AFTER, "patched"),
            (worst.max_limit, "|", INK, "limit"),
        )
        for value, marker, colour, label in points:
            axes.plot(
                max(value / scale, 1e-12), i, marker, color=colour, markersize=9,
                label=label if i == 0 else None, linestyle="none",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel("max error against float64, relative to the largest output")
    axes.legend(
        frameon=False, labelcolor=INK, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.2)
    )
    return _drawing.svg(figure, "errors against float64, unpatched and patched")
