"""What --mode runs."""
