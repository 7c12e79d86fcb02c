"""Recipes: their fields, checks and derived numbers."""
