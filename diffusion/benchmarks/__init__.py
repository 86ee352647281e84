"""Benchmarks of text-to-image models."""
