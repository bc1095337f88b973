"""The texts of mlx-lm's methods that fusions know."""
