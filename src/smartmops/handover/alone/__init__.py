"""Programs that are copied into exports and run without this package; they import nothing of it."""
