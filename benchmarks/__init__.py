"""How fast and how safe the grid is, and where its constants come from."""
