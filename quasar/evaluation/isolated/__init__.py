"""What runs in the two processes of the sandbox. It imports nothing but the standard library."""
