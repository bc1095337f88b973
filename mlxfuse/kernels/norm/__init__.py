"""RMS norms, rotary embedding and int8 activations."""
