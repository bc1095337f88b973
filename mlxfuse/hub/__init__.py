"""From a model's name to a file on this machine: paths, Hugging Face, the demo model."""
