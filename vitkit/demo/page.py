"""The demo's page: one self-contained file with the table, the plots and the photograph."""

from __future__ import annotations

import base64
import io
import platform
from importlib.resources import files
from typing import Any

import torch

from vitkit._version import __version__
from vitkit.verify import Verification

Row = tuple[str, Verification]


def render(rows: list[Row], photo: torch.Tensor, device: str, dtype: str) -> str:
    """HTML of the page; plots are inline SVG that follow the page's light or dark colours."""
    import jinja2

    source = files("vitkit.demo").joinpath("page.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    where = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _png(photo: torch.Tensor) -> str:
    from PIL import Image

    pixels = ((photo[0] * 0.5 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


# Drawn in these and replaced by CSS variables, so that one drawing serves light and dark pages.
_INK, _BEFORE, _AFTER = "#010203", "#010204", "#010205"


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for spine in ("top", "right", "left"):
        axes.spines[spine].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.tick_params(colors=_INK, left=False)
    axes.xaxis.label.set_color(_INK)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitkit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for colour, variable in ((_INK, "ink"), (_BEFORE, "before"), (_AFTER, "after")):
        text = text.replace(colour, f"var(--{variable})")
    return text[text.index("<svg") :]


def _bars(rows: list[Row]) -> str:
    figure, axes = _figure(0.6 + 0.72 * len(rows))
    for i, (_, r) in enumerate(rows):
        before, after = r.seconds_before * 1e3, r.seconds_after * 1e3
        axes.barh(i - 0.19, before, 0.34, color=_BEFORE, label="unpatched" if i == 0 else None)
        axes.barh(i + 0.19, after, 0.34, color=_AFTER, label="patched" if i == 0 else None)
        axes.text(after, i + 0.19, f" {r.speedup:.2f}x", va="center", color=_INK, weight="bold")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per call (median)")
    axes.legend(frameon=False, labelcolor=_INK, loc="lower right")
    return _svg(figure)


def _errors(rows: list[Row]) -> str:
    figure, axes = _figure(0.6 + 0.72 * len(rows))
    for i, (_, r) in enumerate(rows):
        worst = r.worst.parity
        scale = worst.scale or 1.0
        points = (
            (worst.eager_max_error, "o", _BEFORE, "unpatched"),
            (worst.max_error, "D", _AFTER, "patched"),
            (worst.max_limit, "|", _INK, "limit"),
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
        frameon=False, labelcolor=_INK, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.2)
    )
    return _svg(figure)
