"""Corpora made by recipes: a recipe is a value, `curate` runs it, on one core or a cluster, and a folder of shards is what comes out."""

from lmx.data.curate.recipe import Recipe
from lmx.data.curate.run import curate
from lmx.data.curate.workers import Local

__all__ = ["Local", "Recipe", "curate"]
