"""Flower apps, wire format and engines."""
