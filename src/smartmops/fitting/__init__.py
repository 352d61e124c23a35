"""The training loop, the validation part of the training split, the best state, several processes. Writes no run."""
