"""Measuring: whole models, kernels, and what is made of the results."""
