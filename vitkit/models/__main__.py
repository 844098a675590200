"""The tables of docs/models.md, from the configurations and the rows that ``make models`` stored.

python -m vitkit.models                  print them
python -m vitkit.models docs/models.md   put them between the markers of that file
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vitkit.models import create, entry, list_models

MARKERS = "<!-- {}: begin -->", "<!-- {}: end -->"
# Fields of configurations worth a word, in this order.
PARTS = {
    "depth": "{} layers",
    "depths": "{} layers",
    "channels": "channels {}",
    "attention": "attention {}",
    "dim": "width {}",
    "num_heads": "{} heads",
    "mlp": "{}",
    "mlp_hidden": "MLP {}",
    "patch_size": "patch {}",
    "window_size": "window {}",
    "registers": "{} registers",
    "latents": "{} latents",
    "blocks": "{} blocks",
    "layers": "of {} layers",
    "tile_dim": "tiles of {}",
    "context_dim": "text of {}",
    "text_length": "{} text tokens",
    "image_size": "{} px",
    "input_size": "{} px latents",
    "sample_size": "{} px",
}


def describe(config: Any) -> str:
    """A configuration in a line."""
    inner = [describe(c) for c in (getattr(config, k, None) for k in ("trunk", "tile")) if c]
    parts = []
    for field, form in PARTS.items():
        value = getattr(config, field, None)
        if value and value != "gelu":
            value = "-".join(map(str, value)) if isinstance(value, tuple) else value
            parts.append(form.format(value))
    return "; ".join([*inner, ", ".join(parts)])


def parameters(name: str) -> int:
    """Of the full model, without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in create(name).parameters())


def tables() -> dict[str, str]:
    """Markdown by the name of its markers. ``models``: name, parameters, configuration, whose
    weights load, and what was measured at full size; ``hosts``: models of the hosts, patched."""
    from vitkit.benchmarks import models as measured

    data = measured.load()
    known = ("name", "parameters", "configuration", "whose configuration and names of weights")
    titles = (*known, *measured.COLUMNS)
    lines = [_line(titles), _line(["---"] * len(titles)).replace(" ", "")]
    for name in list_models():
        millions = f"{parameters(name) / 1e6:,.1f} M"
        cells = (f"`{name}`", millions, describe(entry(name).config), entry(name).source)
        lines.append(_line((*cells, *measured.cells(name, data["rows"]))))
    return {"models": "\n".join(lines), "hosts": measured.hosts_table(data)}


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def updated(text: str) -> str:
    """A page with its tables as they are now."""
    for name, table in tables().items():
        begin, end = (marker.format(name) for marker in MARKERS)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(updated(page.read_text()))
    else:
        print("\n\n".join(tables().values()))
