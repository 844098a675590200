"""The page of vitkit verify: complete, self-contained, and readable in a real browser."""

from __future__ import annotations

import dataclasses
import re

from browser import assert_readable, on_a_phone

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


@on_a_phone
def test_a_browser_shows_the_page_on_a_phone(tmp_path, bright):
    assert_readable(render(ASKED, found(), layers(), "2x3x8x8"), bright, tmp_path)
