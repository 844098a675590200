"""The ``vitkit`` command: info, doctor, demo, verify, bench."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

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


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
    if facts["cuda_kernels"]:
        _print_kernels(facts["cuda_kernels"])


def _print_kernels(of_op: dict[str, list[dict[str, Any]]]) -> None:
    """What the compiler made of the CUDA kernels."""
    table = Table("op", "CUDA kernel", "built", "for", "registers", "spilled", "shared")
    for op, kernels in of_op.items():
        for k in kernels:
            registers = "-".join(str(n) for n in sorted(set(k["registers"])))
            numbers = (str(k[n]) for n in ("spilled_bytes", "shared_bytes"))
            count = str(k["instantiations"])
            table.add_row(op, k["kernel"], count, k["arch"], registers, *numbers)
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


def _device(asked: Device | None) -> Device:
    import torch

    if asked is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device", param_hint="--device")
    return asked or (Device.cuda if torch.cuda.is_available() else Device.cpu)


@app.command()
def demo(
    image: Annotated[
        Path | None, typer.Option(help="a photograph of your own", exists=True, dir_okay=False)
    ] = None,
    device: Annotated[Device | None, typer.Option(help="cuda where there is one")] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    out: Annotated[Path, typer.Option(help="folder of the HTML page")] = Path("demo-report"),
    pretrained: Annotated[bool, typer.Option(help="download real weights")] = False,
    quick: Annotated[bool, typer.Option(help="smaller models, a few seconds each")] = False,
) -> None:
    """Real models on a real photograph, unpatched and patched, with the proof beside the speed."""
    from vitkit.demo import run

    where = _device(device).value
    raise typer.Exit(run(console, image, where, dtype.value, out, pretrained, quick))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="timm:NAME, or module.path:callable making a model")],
    shape: Annotated[str, typer.Option(help="shape of the input, as 1x3x224x224")] = "1x3x224x224",
    device: Annotated[Device | None, typer.Option(help="cuda where there is one")] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    backend: Annotated[str, typer.Option(help="backend of the patched modules")] = "auto",
) -> None:
    """Patches a model and proves that its numbers stay. Exit code 1 if they do not."""
    import torch

    import vitkit
    from vitkit.demo.models import build_model, parse_shape

    try:
        sizes = parse_shape(shape)
        torch.manual_seed(0)
        built = build_model(model)
    except (ValueError, ImportError, AttributeError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    target = {"device": _device(device).value, "dtype": getattr(torch, dtype.value)}
    built = built.to(**target).eval()
    x = torch.randn(sizes).to(**target)
    result = vitkit.verify(built, x, backend=backend)
    console.print(str(result), highlight=False, markup=False)
    raise typer.Exit(0 if result.ok else 1)


# Its options, --help among them, belong to the benchmarks' own parser.
@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Speed and parity of the ops against the best PyTorch has."""
    from vitkit.benchmarks.run import main as run_benchmarks

    raise typer.Exit(run_benchmarks(context.args))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
