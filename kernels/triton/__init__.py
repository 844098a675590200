"""Triton kernels and their launchers: one module per op, ``forward(...)`` and ``backward(...)``.

Launchers take the argument order of the operators ``vitkit::<op>_fwd`` and ``_bwd``.
"""
