"""Experts of a finished run that come, go and change while the others stay as they are. Trains one."""
