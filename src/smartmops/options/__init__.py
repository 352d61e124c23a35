"""Every option of every command: its name, its default, its limits. Imports nothing that takes time to import."""
