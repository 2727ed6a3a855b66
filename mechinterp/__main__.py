"""``python -m mechinterp``."""

from mechinterp.cli import main

main()
