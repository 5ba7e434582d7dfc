"""Configs: their keys and allowed values, the objects that they describe, and the directory of a run."""
