"""Evaluation: the bound of every image, exact or estimated from a few terms, and the quality of samples."""
