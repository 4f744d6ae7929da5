"""Attention, pointwise operations, losses and FP8 products: a PyTorch reference and a Triton kernel of each."""
