"""A trained run answers: on the terminal, from a file, in OpenAI's form. Trains nothing, writes no run; no HTTP."""
