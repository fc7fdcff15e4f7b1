"""From a config to started ranks: the words of a worker's command, which rank sits where, and how they all ended."""
