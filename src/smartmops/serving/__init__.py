"""A trained run answers: on the terminal, from a file, over HTTP in OpenAI's form. Trains nothing, writes no run."""
