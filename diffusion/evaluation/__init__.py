"""Evaluation: the bound of every image, in full or estimated from a few terms."""
