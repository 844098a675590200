"""The vitkit command, as a user types it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import vitkit
from vitkit import doctor
from vitkit.cli import app


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_no_arguments_show_the_commands():
    done = invoke()
    for command in ("info", "doctor", "demo", "verify", "bench"):
        assert command in done.output


def test_info_as_json():
    done = invoke("info", "--json")
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["vitkit"] == vitkit.__version__
    assert torch.__version__.startswith(facts["libraries"]["torch"].split("+")[0])
    assert facts["cpu_isa"] in facts["build"]["cpu_isas"]
    assert facts["ops"]["flash_attention"]["cpu"]["reference"] == "can run"
    assert facts["ops"]["flash_attention"]["cpu"]["cpu"] == "can run"


def test_kernel_attributes():
    """Of the CUDA library that is there: every kernel with its registers, in info and explain."""
    facts = json.loads(invoke("info", "--json").stdout)
    if doctor._library.native_path("_C_cuda") is None:
        assert facts["cuda_kernels"] == {}
        return
    kernels = facts["cuda_kernels"]["flash_attention"]
    assert {k["arch"] for k in kernels} == set(facts["build"]["cuda_archs"])
    for k in kernels:
        low, high = k["registers"]
        assert 0 < low <= high <= 255 and k["instantiations"] > 0
    assert "attention_fwd_kernel" in {k["kernel"] for k in kernels}
    x = torch.zeros(1, 4, 1, 16)
    text = str(vitkit.explain("flash_attention", x, x, x))
    assert "attention_fwd_kernel x " in text and "registers, no spills" in text
    owned = sum(len(k) for k in facts["cuda_kernels"].values())
    assert owned == len(doctor._library.kernel_attributes()), "a source that belongs to no op"


def test_info_names_every_op():
    done = invoke("info")
    assert done.exit_code == 0
    for op in vitkit.backends.OPS:
        assert op in done.output


def test_doctor_finds_this_installation_sound():
    done = invoke("doctor", "--strict")
    assert done.exit_code == 0, done.output
    assert "broken" not in done.output
    assert f"using {doctor._library.cpu_isa()}" in done.output


def test_doctor_says_how_to_mend_a_missing_library(monkeypatch):
    monkeypatch.setattr(doctor._library, "native_path", lambda name: None)
    monkeypatch.setattr(doctor._library, "native_error", lambda name: "not built")
    monkeypatch.setattr(doctor, "build_facts", lambda: {"missing": {"_C_cpu": "no C++20 compiler"}})
    strict, lenient = invoke("doctor", "--strict"), invoke("doctor")
    assert strict.exit_code == 1 and lenient.exit_code == 0
    text = " ".join(strict.output.split())
    assert "no C++20 compiler" in text and doctor.REBUILD in text
    assert "slower reference backend" in lenient.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_a_timm_model(dtype):
    pytest.importorskip("timm")
    done = invoke("verify", "timm:test_vit", "--dtype", dtype, "--batch", "2", "--seconds", "0.01")
    assert done.exit_code == 0, done.output
    assert "same numbers" in done.output and "flash_attention_fwd on cpu" in done.output
    assert "output [2, 1000]" in done.output and "MiB" in done.output


def test_verify_writes_a_page_and_json(tmp_path):
    page = tmp_path / "new" / "page.html"
    arguments = ("-o", "reduced=True", "--train", "--seconds", "0.01", "--html", str(page))
    done = invoke("verify", "vitkit:vit_s16", *arguments, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"] and found["own"]["Attention"] > 0 and found["gradients"]
    assert list(found["timings"]) == ["unpatched", "patched"]
    text = page.read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", text)
    assert text.count("<svg") == 1 and "blocks.0" in text and "flash_attention_fwd" in text


def test_verify_dry_run_changes_and_runs_nothing():
    done = invoke("verify", "test_cli:never_called", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "vitkit would replace 1 module, left 0" in done.output


def test_verify_a_model_of_ones_own():
    done = invoke("verify", "test_cli:own_model", "--shape", "2x8x4x4", "--seconds", "0")
    assert done.exit_code == 0, done.output
    assert "group_norm_silu_fwd on cpu" in done.output


def own_model():
    return torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 4, 1))


def never_called():
    model = torch.nn.Sequential(torch.nn.GroupNorm(2, 8))
    model.forward = None
    return model


def unreliable_model():
    return torch.nn.Sequential(torch.nn.GroupNorm(2, 8), _Noise())


class _Noise(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_verify_fails_where_numbers_differ():
    done = invoke("verify", "test_cli:unreliable_model", "--shape", "2x8x4x4", "--seconds", "0")
    assert done.exit_code == 1
    assert "NOT the same numbers" in done.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("verify", "timm"), "model must be one of timm:NAME"),
        (("verify", "test_cli:own_model", "--shape", "2x0x4x4"), "shape must look like"),
        (("verify", "test_cli:no_such_model"), "no_such_model"),
        (("verify", "timm:no_such_model"), "timm has no 'no_such_model'"),
        (("verify", "test_cli:own_model"), "does not run, unpatched, on inputs 1x3x224x224"),
        (("verify", "test_cli:own_model", "--backend", "gpu"), "backend must be one of"),
        (("verify", "torch.nn:Identity", "--strict"), "strict must leave nothing"),
        (("verify", "torch.nn:Identity", "--strict", "--dry-run"), "strict must leave nothing"),
        (("verify", "vitkit:uni", "-o", "layers=3"), "got layers"),
        (("verify", "test_cli:own_model", "--dtype", "int8"), "'int8' is not one of"),
        (("demo", "--dtype", "int8"), "'int8' is not one of"),
        (("demo", "--image", "no-such.jpg"), "'no-such.jpg' does not exist"),
        (("bench", "flash"), "no cases for flash"),
        (("bench", "--q", "8x197x12"), "--q must be 4 sizes"),
        (("bench", "--name", "no such model"), "no case matches"),
    ],
)
def test_bad_arguments_are_a_sentence_not_a_traceback(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code not in (0, None)
    text = " ".join(done.output.replace("│", " ").split()) + str(done.exception or "")
    assert isinstance(done.exception, SystemExit)
    assert message in text and "Traceback" not in text


def test_bench_has_its_own_help():
    done = invoke("bench", "--help")
    assert done.exit_code == 0
    assert "--shape" in done.output and "--json" in done.output


def test_bench_of_ones_own_shape(tmp_path):
    path = tmp_path / "rows.json"
    done = invoke(
        "bench", "--q", "1x20x2x16", "--dtype", "bf16", "--seconds", "0.05", "--json", str(path)
    )
    assert done.exit_code == 0, done.output
    [row] = json.loads(path.read_text())["rows"]
    assert row["name"] == "your shape" and row["dtype"] == "bfloat16"
    assert row["max_error"] <= row["error_limit"]


def test_bench_prints_json_alone():
    done = invoke("bench", "--shape", "1x8x4x4", "--groups", "2", "--seconds", "0.05", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["rows"][0]["op"] == "group_norm_silu" and not data["failures"]
    assert data["environment"]["call_microseconds"]["vitkit operator"] > 0
