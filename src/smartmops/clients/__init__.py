"""Who takes part in a federation, which rows each holds, and what server and clients say to each other."""
