"""The configuration: its schema, its checks, and from a node to the object that it names."""
