"""Chat format of a model: prompts and completions as token ids."""
