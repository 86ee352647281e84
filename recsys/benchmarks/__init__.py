"""Benchmarks of recommenders."""
