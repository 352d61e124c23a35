"""Views of the frozen model: its halves, its head, which models can carry the method, a cache written in place."""
