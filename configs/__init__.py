"""One YAML per promise; each header says command, hardware, expected time and result."""
