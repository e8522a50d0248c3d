"""Estimates how good cells are, and what levels do: after a rung, and at the end of trainings stopped early."""
