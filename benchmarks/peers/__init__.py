"""What a user would write instead of this project, from the documentation of the tools; `grid_speed` runs it."""
