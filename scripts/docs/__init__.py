"""Builds what the documentation and README.md take from the program itself: tables, reference pages and numbers."""
