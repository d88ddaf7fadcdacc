"""Recipes for the small models of the demo: data, training, evaluation."""
