"""Reads the store back and says which configurations and techniques win."""
