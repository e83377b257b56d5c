"""Recipes and the settings of components: frozen pydantic models, read once."""
