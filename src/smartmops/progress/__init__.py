"""What a user sees of work that takes long: a bar in a terminal; elsewhere a line now and then, and no blank ones."""
