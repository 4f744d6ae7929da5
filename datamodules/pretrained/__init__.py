"""Locates and converts pretrained models."""
