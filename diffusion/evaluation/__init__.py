"""Evaluation: the bound of every image, in full or from a few terms, and samples with their quality."""
