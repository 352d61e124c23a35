"""What the frozen half makes of the data, computed once, under a key of everything that it depends on."""
