"""Choice of the backend: auto, explicit, VITKIT_BACKEND, explain; nothing heavy at import."""

import subprocess
import sys
import types

import pytest
import torch

import vitkit
from vitkit import _library, backends


def run_python(code, **environment):
    import os

    env = {n: v for n, v in os.environ.items() if n not in ("VITKIT_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env | environment
    )


def test_auto_takes_the_first_that_can():
    asked = []

    def why_not(backend):
        asked.append(backend)
        return None if backend == "reference" else "no"

    assert backends.select("op", "auto", "cuda", why_not) == "reference"
    assert asked == ["cuda", "triton", "reference"]
    assert backends.select("op", "auto", "mps", why_not) == "reference"


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(ValueError, match=r"^op: backend 'triton' cannot run: too hot$"):
        backends.select("op", "triton", "cpu", lambda backend: "too hot")


def test_explain_names_every_reason():
    q = torch.zeros(1, 4, 2, 16)
    text = str(vitkit.explain("flash_attention", q, q, q))
    assert text.splitlines()[0] == "vitkit.flash_attention would run on 'cpu'"
    assert "it runs on cuda tensors, these are on cpu" in text
    assert set(vitkit.explain("flash_attention", q, q, q).reasons) == set(backends.BACKENDS)
    with pytest.raises(ValueError, match="explain: op must be one of"):
        vitkit.explain("softmax", q)
    with pytest.raises(ValueError, match="flash_attention: k must match"):
        vitkit.explain("flash_attention", q, q[..., :8], q)


def test_import_loads_nothing_heavy():
    heavy = "triton timm transformers diffusers torchvision matplotlib jinja2 rich typer"
    code = (
        "import torch; import sys; before = set(sys.modules); import vitkit\n"
        f"print([m for m in {heavy.split()} if m in sys.modules and m not in before])\n"
        "print(open('/proc/self/maps').read().count('_C_cpu') if sys.platform == 'linux' else 0)"
    )
    result = run_python(code)
    assert result.stdout.split("\n")[:2] == ["[]", "0"], result.stdout + result.stderr


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu")],
)
def test_environment_variable_replaces_auto(value, expected):
    code = (
        "import torch, vitkit; x = torch.zeros(1, 4, 2)\n"
        "print(vitkit.explain('group_norm_silu', x, 2).backend)\n"
        "print(vitkit.explain('group_norm_silu', x, 2, backend='reference').backend)"
    )
    result = run_python(code, VITKIT_BACKEND=value)
    assert result.stdout.split() == [expected, "reference"], result.stderr


def test_environment_variable_with_a_wrong_name_is_an_error():
    code = "import torch, vitkit; vitkit.group_norm_silu(torch.zeros(1, 4, 2), 2)"
    assert "backend must be one of" in run_python(code, VITKIT_BACKEND="gpu").stderr


def test_triton_on_cpu_tensors_says_how():
    code = "import torch, vitkit; vitkit.group_norm_silu(torch.zeros(1, 4, 2), 2, backend='triton')"
    assert "set TRITON_INTERPRET=1 before the first import" in run_python(code).stderr


def test_a_broken_native_library_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    from vitkit import _library

    broken = tmp_path / "_C_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_native_errors", {})
    monkeypatch.setattr(_library, "native_path", lambda name: broken)
    x = torch.zeros(1, 4, 2)
    explanation = vitkit.explain("group_norm_silu", x, 2)
    assert explanation.backend == "reference"
    assert "could not be loaded" in explanation.reasons["cpu"]


def test_an_exported_program_loads_the_library_itself(tmp_path):
    """torch.export keeps the operator call only; a fresh process must still find its kernel."""
    path = tmp_path / "program.pt2"

    class Module(torch.nn.Module):
        def forward(self, x):
            return vitkit.group_norm_silu(x, 2, backend="cpu")

    x = torch.arange(16.0).view(1, 4, 4)
    torch.export.save(torch.export.export(Module(), (x,)), path)
    code = (
        f"import torch, vitkit; p = torch.export.load({str(path)!r}).module()\n"
        "print(p(torch.arange(16.0).view(1, 4, 4)).sum().item())"
    )
    result = run_python(code)
    assert float(result.stdout) == pytest.approx(Module()(x).sum().item()), result.stderr


def test_threads_and_forks_agree():
    """Eight Python threads, then a forked child, agree: no shared scratch, no deadlock."""
    code = """
import os, threading, torch, vitkit
torch.manual_seed(0)
q, x = torch.randn(2, 65, 4, 32), torch.randn(2, 64, 9, 9)
linear, conv = torch.ops.vitkit.linear_fwd, torch.ops.vitkit.conv3x3_fwd
w = torch.randn(40, 64, 3, 3)
def run():
    y = linear(x.view(-1, 81), x.view(-1, 81), None, True, False)
    return vitkit.flash_attention(q, q, q), vitkit.group_norm_silu(x, 8), y, conv(x, w, None)
want, results = run(), []
threads = [threading.Thread(target=lambda: results.append(run())) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(results) == 8
assert all(torch.equal(a, b) for r in results for a, b in zip(r, want))
pid = os.fork()
if pid == 0:
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(run(), want)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print("ok")
"""
    env_threads = {"OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=dict(__import__("os").environ) | env_threads,
    )  # fmt: skip
    assert result.stdout.strip() == "ok", result.stderr


def test_the_first_call_of_a_process_is_counted():
    """A FlopCounterMode copies the formulas when it is made, before vitkit hears of it."""
    code = (
        "import torch, vitkit; from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter: vitkit.gelu(torch.ones(10))\n"
        "print(counter.get_total_flops())"
    )
    assert run_python(code).stdout.strip() == "50"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_is_torchs(threads):
    """torch.set_num_threads is obeyed and does not change results."""
    torch.manual_seed(0)
    q, x = torch.randn(2, 130, 3, 32), torch.randn(2, 64, 17, 9)
    before = torch.get_num_threads()
    want = vitkit.flash_attention(q, q, q), vitkit.group_norm_silu(x, 8)
    try:
        torch.set_num_threads(threads)
        got = vitkit.flash_attention(q, q, q), vitkit.group_norm_silu(x, 8)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_80", (7, 5), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100", (10, 3), True),
        ("sm_100", (12, 0), False),
        ("sm_100a", (10, 3), False),
    ],
)
def test_cuda_code_runs_on_gpus_of_its_own_major_version(arch, capability, runs):
    assert _library.arch_runs_on(arch, capability) is runs


def test_a_gpu_without_kernels_is_refused(monkeypatch):
    runtime = types.SimpleNamespace(build_facts=lambda: {"cuda_archs": ["sm_80", "sm_90a"]})
    monkeypatch.setitem(sys.modules, "vitkit._runtime", runtime)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "built for sm_80, sm_90a, this GPU is sm_75" in _library._gpu_error()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert _library._gpu_error() is None
