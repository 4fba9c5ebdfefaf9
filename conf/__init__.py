"""Configuration files of clfed; Hydra reads them from this folder."""
