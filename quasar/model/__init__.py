"""A lean decoder-only transformer for the Llama family, its static KV cache, and where weights come from."""
