"""XLA devices: accelerator, precision, SPMD strategy and ahead-of-time compilation."""
