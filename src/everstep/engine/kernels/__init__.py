"""Kernels of training: products, the adapted projection, the head and packing, with gradients."""
