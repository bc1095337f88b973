"""Products with quantised matrices, and dequantising them."""
