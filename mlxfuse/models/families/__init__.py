"""One file for each family of architectures: the rows of their table (``ROWS``) and what their
files say beside what all have alike.

``NAME_model.py`` beside it, where there is one, is the class that the family needs in place of
mlx-lm's. It is a file of its own because a header is read without importing MLX.
"""
