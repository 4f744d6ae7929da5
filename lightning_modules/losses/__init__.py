"""Training objectives and the teachers that they use."""
