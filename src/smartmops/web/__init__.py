"""HTTP in OpenAI's form over a run: routes, keys, limits on clients, a document that describes it. Knows no tokens."""
