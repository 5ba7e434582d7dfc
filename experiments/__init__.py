"""Studies on top of the library: `python -m experiments.NAME --help`; nothing imports them."""
