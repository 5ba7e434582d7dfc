"""From a config to objects: what a config may say, what it means, and the directory of a run."""
