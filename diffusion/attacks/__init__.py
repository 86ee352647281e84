"""Adversarial attacks on text-to-image models that should have forgotten a concept."""
