"""Metrics of generated answers, baselines and comparisons of models."""
