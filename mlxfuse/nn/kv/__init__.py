"""Key-value caches that compress themselves."""
