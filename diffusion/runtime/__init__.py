"""What keeps a run alive and its files sound; nothing here knows of diffusion."""
