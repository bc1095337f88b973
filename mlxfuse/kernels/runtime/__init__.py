"""How a kernel's Metal source is found, launched, tested and tuned."""
