"""Speed, memory and scaling, measured: python -m benchmarks.NAME --help. Nothing imports this."""
