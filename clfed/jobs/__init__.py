"""The jobs of the ``clfed`` command, one file each."""
