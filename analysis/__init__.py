"""Reads the store back and says which configurations and techniques win."""

import grid  # noqa: F401  (prepares the process for MLflow)
