"""``python -m clfed`` is the ``clfed`` command."""

from clfed.cli import main

main()
