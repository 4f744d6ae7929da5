"""Location and conversion of pretrained models."""
