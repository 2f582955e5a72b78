"""Whole slides: read them, find their tissue, map it with a TissueModel, and write what other programs open."""
