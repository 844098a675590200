"""Packaging of vitkit: metadata is in pyproject.toml, the native build in csrc/build.py."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _load_native():
    spec = importlib.util.spec_from_file_location("vitkit_native_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


native = _load_native()
plan = native.plan()


class BuildNative(build_ext):
    """Runs csrc/build.py once for all extensions. A failing compiler costs the kernels, not the
    install."""

    def run(self):
        self._ran = False
        super().run()

    def build_extension(self, ext):
        if self._ran:
            return
        self._ran = True
        out_dir = Path(self.get_ext_fullpath(ext.name)).parent
        try:
            native.build(out_dir, ROOT / "build" / "native", plan)
        except subprocess.CalledProcessError as error:
            print(
                f"vitkit: the native build failed ({error}); installing without it."
                " `vitkit doctor` says how to mend it.",
                file=sys.stderr,
            )


# Folders that are not packages where they lie: a top-level package `kernels` would shadow the
# Hugging Face one (kernels/README.md).
MAPPED = {
    "vitkit.kernels": "kernels/triton",
    "vitkit.benchmarks": "benchmarks",
    "vitkit.benchmarks.cases": "benchmarks/cases",
}
packages = [*find_packages(include=["vitkit", "vitkit.*"]), *MAPPED]
setup(
    packages=packages,
    package_dir={"vitkit": "vitkit", **MAPPED},
    ext_modules=[Extension(f"vitkit.{name}", [], optional=True) for name in plan.targets],
    cmdclass={"build_ext": BuildNative},
)
