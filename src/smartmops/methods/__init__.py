"""A frozen base and the name of a method in, a trainable model and its parameter groups out. Knows no data."""
