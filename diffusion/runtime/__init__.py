"""The parts that keep a run alive and its files sound. Nothing here knows of diffusion."""
