"""Measures what early stopping saved and what it may have cost, from the unstopped controls."""
