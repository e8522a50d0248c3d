"""A whole grid, from the request to the table of results."""
