"""Finished run folders in, tables and pictures out. Loads no model."""
