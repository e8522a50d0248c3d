"""Measurements: how fast and how robust the grid is, and where its constants come from."""
