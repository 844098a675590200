"""``python -m vitkit``."""

from vitkit.cli import main

main()
