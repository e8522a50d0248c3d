"""What a user would write instead of using this project, following the tools' documentation; run by `grid_speed`."""
