"""The programs that --mode runs."""
