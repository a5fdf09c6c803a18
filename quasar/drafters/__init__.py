"""Drafters: propose a token tree for the current context. One file and one YAML each."""
