"""The ``analyze`` command."""
