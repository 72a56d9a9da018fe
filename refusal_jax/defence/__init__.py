"""Recipes that make a model harder to abliterate."""
