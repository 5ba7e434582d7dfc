"""Training: the pure step, the optimizer, the devices, the loop."""
