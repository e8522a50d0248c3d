"""Where trials run: the only folder that knows Ray."""
