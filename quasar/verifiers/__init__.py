"""Verifiers, which score a draft in one forward pass. Each has one file here and one YAML file in conf/."""
