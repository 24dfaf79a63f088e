"""Training data: corpora, shards, tokenizers, and cached tokens."""
