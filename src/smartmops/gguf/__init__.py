"""GGUF files in, plain model folders out, made once and kept in the cache. Makes nothing of a header that lies."""
