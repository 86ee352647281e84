"""Unlearning methods that only make sense for questions about images; one file is one method."""
