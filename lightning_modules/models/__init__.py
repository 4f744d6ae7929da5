"""Base models with adapters, and the forward passes over packed rows."""
