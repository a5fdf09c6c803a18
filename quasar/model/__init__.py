"""A decoder-only transformer for the Llama family, its KV cache, its tokenizer, and the sources of its weights."""
