"""Options by what they are about: the help page of a command, and its options in a YAML file, read and written."""
