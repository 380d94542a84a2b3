"""Text files, tokenizers, and batches of token ids."""
