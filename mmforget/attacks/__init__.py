"""Attacks on per-example numbers, and on weights through the shared loop."""
