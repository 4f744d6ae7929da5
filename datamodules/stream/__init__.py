"""Streaming pipeline from documents to batches; it can be resumed at any row.

``epoch_order`` plans the order of an epoch. ``workers`` runs ``preprocessing`` in reading processes and keeps the
results in the ``token_cache``. ``blocks`` packs documents into rows. ``batching`` distributes rows over ranks.
``resume`` holds the position that a checkpoint stores.
"""
