"""What a GPU makes of the kernels and of whole verification passes, in one folder of JSON and plots."""
