"""Drafters, which propose a token tree for the current context. Each has one file here and one YAML file in conf/."""
