"""The table of docs/models.md, from the configurations.

python -m vitkit.models                  print it
python -m vitkit.models docs/models.md   put it between the markers of that file
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from vitkit.models import create, entry, list_models

BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
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


def table() -> str:
    """Markdown: name, parameters, configuration, and whose weights load."""
    rows = ["| name | parameters | configuration | whose configuration and names of weights |"]
    rows.append("|---|---|---|---|")
    for name in list_models():
        millions = f"{parameters(name) / 1e6:,.1f} M"
        rows.append(
            f"| `{name}` | {millions} | {describe(entry(name).config)} | {entry(name).source} |"
        )
    return "\n".join(rows)


def updated(text: str) -> str:
    """A page with its table as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(updated(page.read_text()))
    else:
        print(table())
