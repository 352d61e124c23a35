"""Options of the commands that read data or finished runs, and of those that answer."""
