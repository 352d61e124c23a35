"""Finished runs and data looked at: measured again, asked, previewed. Trains nothing, prints nothing."""
