"""What values may be, and what is wrong with them: limits, folders that options name, one process in a folder."""
