"""The command ``cache-teacher``."""
