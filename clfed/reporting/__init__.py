"""What a run leaves behind: results, figures, tables, metrics, progress and the W&B run.

Nothing is imported here, so that ``clfed --help`` and tools that only read results stay quick.
"""
