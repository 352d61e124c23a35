"""Text in, tokens out. Knows examples, files, templates and labels; knows no models."""
