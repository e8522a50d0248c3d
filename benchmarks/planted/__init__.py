"""Simulates grids with known effects, and counts how often the analysis finds them."""
