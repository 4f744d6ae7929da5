"""One file a subcommand of ``main.py``, and what they share."""
