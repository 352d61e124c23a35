"""A frozen model in, a smaller frozen model out."""
