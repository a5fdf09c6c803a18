"""The configuration: its schema, its checks, and building the objects that it names."""
