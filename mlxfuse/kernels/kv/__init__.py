"""Compressed keys and values: packing, unpacking and attention over them."""
