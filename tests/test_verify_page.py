"""The page of vitkit verify: complete, self-contained, and readable in a real browser."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess

import pytest

from vitkit._numerics import Parity
from vitkit.layer_errors import LayerError
from vitkit.patch.report import Replaced, Report, Skipped
from vitkit.verification import OutputParity, Timing, Verification
from vitkit.verify_command import Asked
from vitkit.verify_page import render

NAMES = ["unpatched", "patched", "compiled", "patched, compiled"]
LONG = "encoder.layers.11.a_module_with_a_very_long_name.attention.output.projection"


def found(error: float = 1e-6) -> Verification:
    def tensor(name: str) -> OutputParity:
        return OutputParity(
            name, (2, 1000), "float32", Parity(error, 3e-6, error, 3e-6, 1e-6, 1.0), 1e-6
        )

    report = Report(
        replaced=[Replaced(LONG, "Attention", "flash_attention")],
        skipped=[Skipped("", "Odd<b>", "a subclass of timm's Attention: it may compute otherwise")],
    )
    timings = {
        n: Timing(0.1 / (i + 1), i + 1.0, (0.9, i + 1.5), 2.0**20) for i, n in enumerate(NAMES)
    }
    gradients = [tensor(f"gradient of blocks.{i}.weight") for i in range(20)]
    calls = {"flash_attention_fwd": {"cpu": 12}}
    return Verification(report, {}, [tensor("output")], gradients, timings, 5, calls)


def layers(patched: float = 2e-7) -> list[LayerError]:
    return [LayerError(f"blocks.{i}", 1e-7, patched, 1e-6) for i in range(5)] + [
        LayerError(LONG, 0.0, 0.0, 0.0)
    ]


ASKED = Asked("timm:<script>x</script>", options=("depth=2",), train=True)


def test_the_page_holds_what_was_found_and_needs_nothing_else():
    text = render(ASKED, found(), layers(), "2x3x8x8")
    assert "Same numbers, 2.00x" in text and "<script>" not in text and "Odd<b>" not in text
    assert all(f">{n}<" in text for n in NAMES) and "the model itself" in text
    assert "20 gradients, the nearest to their limit first" in text
    assert text.count("gradient of blocks.") == 12
    assert text.count("<svg") == 1 and "blocks.3" in text and "#0102" not in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", text)


def test_the_page_says_no():
    text = render(ASKED, found(error=1e-5), layers(), "2x3x8x8")
    assert "Not the same numbers" in text and "TOO LARGE" in text and "Same numbers" not in text


def test_nothing_replaced_makes_no_plot():
    bare = dataclasses.replace(found(), report=Report(), kernel_calls={}, timings={}, gradients=[])
    text = render(ASKED, bare, [], "2x3x8x8")
    assert "Nothing to verify" in text and "<svg" not in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
@pytest.mark.parametrize(("scheme", "bright"), [(1, True), (0, False)], ids=["light", "dark"])
def test_a_browser_shows_the_page_on_a_phone(tmp_path, scheme, bright):
    """Nothing is wider than the screen, and the colours follow the reader's."""
    from PIL import Image

    width = 500  # the narrowest window of a headless Chromium
    probe = "<script>document.title = document.documentElement.scrollWidth</script>"
    text = render(ASKED, found(), layers(), "2x3x8x8").replace("</body>", f"{probe}</body>")
    (tmp_path / "page.html").write_text(text)
    shot = tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        "--hide-scrollbars", f"--blink-settings=preferredColorScheme={scheme}",
        f"--screenshot={shot}", "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    with Image.open(shot) as image:
        pixels = image.convert("L")
        assert (pixels.getpixel((2, 2)) > 200) == bright
        assert len(pixels.getcolors(256)) > 20, "the page is blank"
    title = re.search(r"<title>(\d+)</title>", done.stdout)
    assert title is not None and int(title.group(1)) <= width
