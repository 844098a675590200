"""Interfaces of other libraries on vitkit's kernels."""
