"""Documents to batches: split, de-duplicated, mixed, shuffled, packed and dealt to ranks, resumable at any row.

``order`` plans an epoch, ``prepare`` is the work of a reading process, ``cache`` keeps what it made, ``blocks`` turns
documents into rows, ``loading`` deals rows to batches and holds the cursor.
"""
