"""Measures and checks the kernels and whole verification passes on a GPU; writes one folder of JSON and plots."""
