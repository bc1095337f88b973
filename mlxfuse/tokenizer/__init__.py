"""What a GGUF file says about text: vocabulary, tokenizer and chat template; no mlx."""
