"""Which trials a grid consists of, how many run at once, which ones stop early, and what the grid costs."""
