"""Batched greedy generation, constrained decoding and log-likelihoods."""
