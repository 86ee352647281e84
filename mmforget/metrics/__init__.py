"""Metrics on per-example numbers."""
