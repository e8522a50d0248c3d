"""Replays stopping rules and estimators on real learning curves, and compares them with the truth."""
