"""Writing a model in another form: kernel streams, or an MLX-LM checkpoint."""
