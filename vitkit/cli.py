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

SPECS = (
    "timm:NAME, torchvision:NAME, transformers:CLASS, diffusers:CLASS, vitkit:NAME,"
    " module.path:callable or file.py:callable"
)


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
    model: Annotated[str, typer.Argument(help=SPECS)],
    shape: Annotated[
        str | None, typer.Option(help="of the input, as 1x3x224x224; the model's own if left out")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="of an input the model chooses")] = 1,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="of the model's maker, as depth=2; may be repeated"),
    ] = None,
    device: Annotated[Device | None, typer.Option(help="cuda where there is one")] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    backend: Annotated[str, typer.Option(help="backend of the patched modules")] = "auto",
    train: Annotated[bool, typer.Option("--train", help="train mode, with gradients")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile of both too")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="fail if anything is left")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only what would change")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="of timing; 0 for none")] = 3.0,
    html: Annotated[
        Path | None, typer.Option(help="write a page here, with the error of every layer")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="plain JSON")] = False,
) -> None:
    """Patches a model and proves that its numbers stay. Exit code 1 if they do not."""
    from vitkit import verify_command

    asked = verify_command.Asked(
        spec=model, shape=shape, batch=batch, options=tuple(option or ()),
        device=_device(device).value, dtype=dtype.value, backend=backend, train=train,
        compiled=compiled, strict=strict, seconds=seconds,
    )  # fmt: skip
    try:
        if dry_run:
            report = verify_command.dry_run(asked)
            print(json.dumps(report.to_dict(), indent=2)) if as_json else _show(report)
            return
        result = verify_command.run(asked, html)
    except verify_command.Refused as error:
        raise typer.BadParameter(str(error)) from error
    print(json.dumps(result.to_dict(), indent=2)) if as_json else _show(result)
    if html is not None and not as_json:
        console.print(f"Page with the error of every layer: {html}", highlight=False)
    raise typer.Exit(0 if result.ok else 1)


def _show(found: Any) -> None:
    """A table in a terminal, lines elsewhere."""
    if console.is_terminal:
        console.print(found)
    else:
        print(found)


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
