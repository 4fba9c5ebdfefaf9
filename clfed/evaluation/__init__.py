"""Scores over images, and the accounts of bytes, seconds and memory."""
