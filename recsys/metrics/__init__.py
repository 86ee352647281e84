"""Metrics of recommenders."""
