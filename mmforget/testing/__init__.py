"""Toy adapters of every shape, and the contract that each loss method must keep."""
