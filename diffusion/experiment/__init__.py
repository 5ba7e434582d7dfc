"""From a config to objects: the allowed values of a config, their meaning, and the directory of a run."""
