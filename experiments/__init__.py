"""Studies on top of the library, each a small module with a command of its own; nothing imports them."""
