"""Unlearning methods for text-to-image models."""
