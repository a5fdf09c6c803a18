"""What is decoded, and what the outcome is measured against."""
