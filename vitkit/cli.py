"""The ``vitkit`` command: info, doctor, demo, verify, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Kernels for vision models: same numbers, faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="plain JSON")] = False) -> None:
    """Versions, devices, how the kernels were built, and what each op would run on."""
    from vitkit import doctor

    facts = doctor.info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console.print(
        f"[bold]vitkit {facts['vitkit']}[/], Python {facts['python']}, {facts['platform']}"
    )
    libraries = [f"{name} {v}" for name, v in facts["libraries"].items() if v]
    console.print(", ".join(libraries), highlight=False)
    console.print(f"devices: {', '.join(facts['devices'])}; {facts['threads']} CPU threads")
    build = facts["build"]
    console.print(
        f"CPU kernels: {facts['cpu_isa'] or 'none'}"
        f" (built: {', '.join(build.get('cpu_isas', [])) or 'none'});"
        f" CUDA kernels built for: {', '.join(build.get('cuda_archs', [])) or 'none'}"
    )
    table = Table("op", "device", "backend", "state")
    for op, devices in facts["ops"].items():
        for device, states in devices.items():
            for backend, state in states.items():
                table.add_row(op, device, backend, state)
    console.print(table)


@app.command()
def doctor(
    strict: Annotated[bool, typer.Option(help="fail if any native CPU kernel is missing")] = False,
) -> None:
    """What is missing or broken here, and the command that mends it."""
    from vitkit import doctor as examiner

    findings = examiner.examine()
    for f in findings:
        mark = (
            "[green]ok[/]     " if f.ok else "[red]broken[/] " if f.needed else "[yellow]missing[/]"
        )
        console.print(f"{mark} [bold]{f.name}[/]: {f.text}", highlight=False)
        if f.mend:
            console.print(f"          mend: {f.mend}", highlight=False, markup=False)
    broken = [f for f in findings if f.needed and not f.ok]
    if broken and (strict or any(f.name == "CUDA kernels" for f in broken)):
        raise typer.Exit(1)
    if broken:
        console.print("vitkit works without these, on its slower reference backend.")


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="a photograph of your own")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    out: Annotated[Path, typer.Option(help="folder of the HTML page")] = Path("demo-report"),
    pretrained: Annotated[bool, typer.Option(help="download real weights")] = False,
    quick: Annotated[bool, typer.Option(help="smaller models, a few seconds each")] = False,
) -> None:
    """Real models on a real photograph, unpatched and patched, with the proof beside the speed."""
    from vitkit.demo import run

    raise typer.Exit(run(console, image, device, dtype, out, pretrained, quick))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="timm:NAME, or module.path:callable making a model")],
    shape: Annotated[str, typer.Option(help="shape of the input, as 1x3x224x224")] = "1x3x224x224",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    backend: Annotated[str, typer.Option(help="backend of the patched modules")] = "auto",
) -> None:
    """Patches a model and proves that its numbers stay. Exit code 1 if they do not."""
    import torch

    import vitkit
    from vitkit.demo.models import build_model, parse_shape

    torch.manual_seed(0)
    built = build_model(model).to(device=device, dtype=getattr(torch, dtype)).eval()
    x = torch.randn(parse_shape(shape)).to(device=device, dtype=getattr(torch, dtype))
    result = vitkit.verify(built, x, backend=backend)
    console.print(str(result), highlight=False, markup=False)
    raise typer.Exit(0 if result.ok else 1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Speed and parity of the ops against the best PyTorch has; `vitkit bench --help` for
    options."""
    from vitkit.benchmarks.run import main as run_benchmarks

    raise typer.Exit(run_benchmarks(context.args))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
