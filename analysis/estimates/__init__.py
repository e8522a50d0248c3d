"""Estimates what the levels do: after a rung, and at the end of a training that was stopped early."""
