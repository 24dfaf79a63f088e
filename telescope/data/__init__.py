"""What is trained on: corpora, shards, tokenizers, and the tokens that are kept."""
