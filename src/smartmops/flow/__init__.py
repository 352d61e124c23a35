"""From a frozen base and data to a result: the same steps for every command, in one order."""
