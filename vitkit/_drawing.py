"""Plots as inline SVG that follow the light or dark colours of the page around them.

Each colour is drawn as a placeholder and replaced by a CSS variable of that name, which the page
defines.
"""

from __future__ import annotations

import io
import re
from typing import Any

# Placeholder -> CSS variable.
COLOURS = {
    "ink": "#010203",
    "before": "#010204",
    "after": "#010205",
    "line": "#010206",
    "bad": "#010207",
}
INK, BEFORE, AFTER, LINE, BAD = COLOURS.values()


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A transparent figure in inches, and its axes (a list, row by row, if there are several)."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.patch.set_alpha(0)
    axes = drawn.subplots(rows, columns, squeeze=False).ravel()
    for a in axes:
        a.patch.set_alpha(0)
        for spine in ("top", "right"):
            a.spines[spine].set_visible(False)
        for spine in ("bottom", "left"):
            a.spines[spine].set_color(INK)
        a.tick_params(which="both", colors=INK)
        for text in (a.xaxis.label, a.yaxis.label, a.title):
            text.set_color(INK)
    return drawn, axes[0] if len(axes) == 1 else list(axes)


def svg(drawn: Any, label: str) -> str:
    """``drawn`` as an <svg> element that screen readers call ``label``."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitkit"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def standalone(element: str) -> str:
    """An SVG file of its own from ``svg``'s element: colours for a light page, and for a dark one
    where the reader prefers that."""
    light = "--ink: #22252a; --before: #b9b3a8; --after: #0b7a75; --line: #dedad3; --bad: #b3261e;"
    dark = "--ink: #e8e6e1; --before: #6b6f76; --after: #3cc4b8; --line: #34383d; --bad: #ff8a80;"
    style = (
        f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark)"
        f" {{ :root {{ {dark} }} }} text {{ fill: var(--ink); }}</style>"
    )
    end = element.index(">") + 1
    return element[:end] + style + element[end:]
