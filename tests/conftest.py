"""Session set-up: device option, Triton's interpreter without a GPU, poisoned uninitialised
memory."""

import os

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device the op tests run on: cpu or cuda")


def pytest_configure(config):
    # Both must be set before torch's or Triton's first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        import triton_interpreter

        triton_interpreter.install()


# With two processes and a file at a time (make test), the longest files must not come last.
LONGEST = (
    "test_native_kernels", "test_triton_aot", "test_emulated_mutants", "test_emulated_sanitizers",
    "test_native_mutants", "test_emulated_attention", "test_library", "test_dilated_attention",
    "test_window_attention",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN (integers: the largest value): reading what was never written must
    show."""
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cpu_isa():
    """Runs the test with a given instruction set: ``cpu_isa("base")``; skips where this machine
    cannot."""
    from native_library import cpu_library

    library = cpu_library()

    def force(name):
        if library.vitkit_force_cpu_isa(name.encode()) != 0:
            pytest.skip(f"this machine or build has no {name}")

    yield force
    library.vitkit_force_cpu_isa(b"auto")


@pytest.fixture
def one_thread():
    """Small tensors: threads that wait for each other cost ten times what is computed."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
