"""A run: recipe -> stage 1 -> pseudo masks -> stage 2 -> scores -> report -> model."""

from tissuehint.pipeline.recipe import Recipe, load_recipe
from tissuehint.pipeline.stages import RunResult, run

__all__ = ["Recipe", "RunResult", "load_recipe", "run"]
