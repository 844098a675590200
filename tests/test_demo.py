"""vitkit demo: real models, the verdict, and a page that needs nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from vitkit.cli import app
from vitkit.demo import models, page
from vitkit.verify import verify

pytest.importorskip("timm")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = CliRunner().invoke(app, ["demo", "--quick", "--out", str(out)], env={"COLUMNS": "140"})
    return done, out


def test_every_model_keeps_its_numbers(demo):
    done, _ = demo
    assert done.exit_code == 0, done.output
    assert "Same numbers in every model." in done.output
    for name in ("ViT-B/16", "Swin-T", "SigLIP so400m", "KL-VAE decode", "U-Net, one step"):
        [line] = [line for line in done.output.splitlines() if line.strip().startswith(name)]
        replaced = int(re.search(r"\s(\d+)\s+\d\.\de", line).group(1))
        assert replaced > 0 and " cpu " in line and line.strip().endswith("ok"), line


def test_the_page_is_self_contained(demo):
    _, out = demo
    assert [p.name for p in out.iterdir()] == ["index.html"]
    text = (out / "index.html").read_text()
    assert text.count("<svg") == 2 and "data:image/jpeg;base64," in text
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", text)
    assert all(link.startswith(("data:", "#")) for link in links), links
    assert "ViT-B/16" in text and "FAILED" not in text
    assert "prefers-color-scheme: dark" in text


def test_a_failing_model_fails_the_demo(monkeypatch, tmp_path):
    class Noise(torch.nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    broken = models.DemoModel("noise", lambda: (Noise(), (torch.zeros(2, 3),), {}))
    monkeypatch.setattr("vitkit.demo.demo_models", lambda *options: [broken])
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)], env={"COLUMNS": "140"})
    assert done.exit_code == 1
    assert "FAILED" in done.output and "Some numbers differ." in done.output


def test_names_are_escaped_on_the_page():
    result = verify(torch.nn.GroupNorm(1, 2), torch.randn(1, 2, 3, 3), seconds=0.01)
    text = page.render([("<script>x</script>", result)], torch.zeros(1, 3, 8, 8), "cpu", "float32")
    assert "<script>x" not in text


def test_a_photograph_of_ones_own(tmp_path):
    from PIL import Image

    path = tmp_path / "own.png"
    Image.new("RGBA", (40, 30), (255, 0, 0, 255)).save(path)
    pixels = models.photograph(path, 16)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[0, :, 8, 8].tolist() == [1.0, -1.0, -1.0]
    assert models.photograph(None, 32).std() > 0.1
