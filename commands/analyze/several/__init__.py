"""Names, shared batches and sums of several reports that one command analyses."""
