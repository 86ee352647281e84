"""Recommenders: factorisation, graph and multimodal backbones."""
