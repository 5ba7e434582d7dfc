"""Output for people: metrics, progress, pictures, curves, summaries and the page of a run."""
