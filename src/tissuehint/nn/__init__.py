"""Shared network parts: encoders, segmentation networks, and how their weights are read."""
