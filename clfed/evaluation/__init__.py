"""Scores over test images."""
