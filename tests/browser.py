"""Pages in a real browser, as a phone shows them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH = 500  # the narrowest window of a headless Chromium


def on_a_phone(test):
    """Runs a test with light and with dark colours, where there is a browser."""
    schemes = pytest.mark.parametrize("bright", [True, False], ids=["light", "dark"])
    return schemes(pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open it in")(test))


def assert_readable(page: str, bright: bool, folder: Path) -> None:
    """Nothing is wider than the screen, and the colours follow the reader's."""
    from PIL import Image

    probe = "<script>document.title = document.documentElement.scrollWidth</script>"
    (folder / "page.html").write_text(page.replace("</body>", f"{probe}</body>"))
    shot = folder / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},900",
        "--hide-scrollbars", f"--blink-settings=preferredColorScheme={int(bright)}",
        f"--screenshot={shot}", "--dump-dom", (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    with Image.open(shot) as image:
        pixels = image.convert("L")
        assert (pixels.getpixel((2, 2)) > 200) == bright
        assert len(pixels.getcolors(256)) > 20, "the page is blank"
    title = re.search(r"<title>(\d+)</title>", done.stdout)
    assert title is not None and int(title.group(1)) <= WIDTH
