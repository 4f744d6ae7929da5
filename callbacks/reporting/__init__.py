"""Reports of a run: HTML page, tables, figures and training curves."""
