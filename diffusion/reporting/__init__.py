"""What a person sees: metrics, progress, pictures, curves and summaries."""
