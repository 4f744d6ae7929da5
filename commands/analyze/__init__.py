"""The command ``analyze``."""
