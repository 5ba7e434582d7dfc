"""Training: the pure step, the optimizer, data parallelism, the loop."""
