"""Attention, pointwise operations, losses and FP8 products, most as a PyTorch reference and a Triton kernel."""
