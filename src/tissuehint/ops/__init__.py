"""Shared mathematics: pure functions on arrays and tensors, no state and no files."""
