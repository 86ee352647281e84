"""Unlearning methods of recommenders."""
