"""The demo: real models on a real photograph, unpatched and patched, with the proof beside the
speed, as a table and as a page."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vitkit.demo.models import DemoModel, demo_models, photograph
from vitkit.verification import Verification
from vitkit.verify import verify

STEPS = 5  # of verify's progress, building the model included


def run(
    console: Console,
    image: Path | None,
    device: str,
    dtype: str,
    out: Path,
    pretrained: bool,
    quick: bool,
) -> int:
    """Runs the demo; returns the exit code, 1 if any output misses the tolerance."""
    models = demo_models(image, pretrained, quick)
    results: list[tuple[DemoModel, Verification]] = []
    columns = (TextColumn("{task.description:<52}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=STEPS * len(models))
        for index, entry in enumerate(models):

            def tell(step: str, entry: DemoModel = entry) -> None:
                progress.advance(task)
                progress.update(task, description=f"{entry.name}: {step}")

            tell("building")
            results.append((entry, _verify(entry, device, dtype, 1.0 if quick else 6.0, tell)))
            progress.update(task, completed=STEPS * (index + 1))
    console.print(_table(results, device, dtype))
    page = _write_page(out, image, results, device, dtype)
    ok = all(result.ok for _, result in results)
    console.print("Same numbers in every model." if ok else "[red]Some numbers differ.[/]")
    console.print(f"Page with the plots: {page}", highlight=False)
    return 0 if ok else 1


def _verify(entry: DemoModel, device: str, dtype: str, seconds: float, tell: Any) -> Verification:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs, options = entry.make()
    target = getattr(torch, dtype)

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, target if value.is_floating_point() else None)

    return verify(
        model.to(device, target),
        *(place(v) for v in inputs),
        seconds=seconds,
        progress=tell,
        **{name: place(v) for name, v in options.items()},
    )


def _table(results: list[tuple[DemoModel, Verification]], device: str, dtype: str) -> Table:
    cpu = f"CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device == "cuda" else cpu
    title = f"{dtype} on {where}; errors against a float64 run, milliseconds per call"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold", max_width=16)
    # Two lines of heading, so that the table fits a terminal of 80 columns.
    names = ("mod-\nules", "max\nerror", "rela-\ntive", "before", "after", "speed-\nup")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("back-\nend", no_wrap=True)
    table.add_column("parity", no_wrap=True)
    for entry, r in results:
        table.add_row(
            entry.name,
            str(len(r.report.replaced)),
            f"{r.worst.parity.max_error:.1e}",
            f"{r.worst.parity.relative:.1e}",
            f"{r.seconds_before * 1e3:.0f}",
            f"{r.seconds_after * 1e3:.0f}",
            f"[bold]{r.speedup:.2f}x[/]",
            r.backend,
            "[green]ok[/]" if r.ok else "[red]FAILED[/]",
        )
    return table


def _write_page(
    out: Path,
    image: Path | None,
    results: list[tuple[DemoModel, Verification]],
    device: str,
    dtype: str,
) -> Path:
    from vitkit.demo.page import render

    out.mkdir(parents=True, exist_ok=True)
    page = out / "index.html"
    rows = [(entry.name, result) for entry, result in results]
    page.write_text(render(rows, photograph(image, 256), device, dtype))
    return page
