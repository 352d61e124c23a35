"""What the command line calls DATA in, examples out. Knows files, columns and tasks; knows no tokens, no models."""
