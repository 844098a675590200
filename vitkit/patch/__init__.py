"""Swapping vitkit's kernels into a model that exists, and taking them out again.

``patch`` changes instances, never a class or a library namespace. Most replacements give a module a
subclass of its own class with another ``forward``: parameters, buffers, hooks, submodules and
state_dict keys stay where they are, ``isinstance`` still holds, copies and pickles keep the
replacement, and undoing it is putting the class back. Rules match modules by class and attributes,
never models by name; each host library's rules are in ``vitkit/patch/hosts``.
"""

from vitkit.patch.engine import is_patched, patch, patched, unpatch
from vitkit.patch.report import Replaced, Report, Skipped

__all__ = ["Replaced", "Report", "Skipped", "is_patched", "patch", "patched", "unpatch"]
