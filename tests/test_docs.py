"""Examples run, tables equal the stored results, and links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import vitkit
from vitkit.benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    "vitkit.attention_map",
    "vitkit.backends",
    "vitkit.ops.dilated_attention",
    "vitkit.ops.flash_attention",
    "vitkit.ops.gated_residual",
    "vitkit.ops.geglu",
    "vitkit.ops.gelu",
    "vitkit.ops.group_norm_silu",
    "vitkit.ops.layer_norm_modulate",
    "vitkit.ops.patch_embed",
    "vitkit.ops.patch_embed_packed",
    "vitkit.ops.rope_2d",
    "vitkit.ops.swiglu",
    "vitkit.nn.patch",
    "vitkit.ops.window_attention",
    "vitkit.nn.attention",
    "vitkit.nn.dilated",
    "vitkit.nn.mlp",
    "vitkit.nn.multihead",
    "vitkit.nn.norm",
    "vitkit.nn.residual",
    "vitkit.nn.rope",
    "vitkit.nn.window",
    "vitkit.models.registry",
    "vitkit.patch.engine",
    "vitkit.score_bias",
    "vitkit.verify",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.attempted > 0 and result.failed == 0


def test_every_public_name_is_documented():
    for name in vitkit.__all__:
        if name != "__version__":
            assert (getattr(vitkit, name).__doc__ or "").strip(), name


def test_readme_examples():
    pytest.importorskip("timm")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_tables_equal_the_stored_results():
    results = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json"))
    assert results, "the README's table has no results behind it"
    readme = ROOT / "README.md"
    docs = ROOT / "docs" / "benchmarks.md"
    page = ROOT / "docs" / "benchmarks.html"
    found = [str(results[-1]), "--readme", str(readme), "--docs", str(docs), "--html", str(page)]
    assert report.main([*found, "--check"]) == 0


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=str
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target
