"""Commands beside the jobs, one module each: ``SENTENCE``, ``add_arguments``, ``run``."""
