"""What a finished run has learnt, in forms that other programs load, and on the hub. Trains nothing."""
