"""Encodes prompts and completions as token ids in a model's chat format."""
