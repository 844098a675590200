"""The benchmark suite: speed and parity of every op against the best PyTorch has.

Installed as ``vitkit.benchmarks``. One set of cases serves ``vitkit bench``, ``pytest benchmarks/``
and ``make gpu``.
"""
