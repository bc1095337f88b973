"""Key-value caches that compress themselves, of one sequence and of a batch."""

from . import batch_cache as batch_cache  # a cache finds the class of its batch in mlx-lm's module
