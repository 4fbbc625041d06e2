"""A recipe: the YAML file that says which model to compress, and how, stage by stage."""

from autoglm_compress.problems import Problem, RecipeError
from autoglm_compress.recipe.load import load_recipe
from autoglm_compress.recipe.schema import SOURCE, Recipe

__all__ = ["SOURCE", "Problem", "Recipe", "RecipeError", "load_recipe"]
