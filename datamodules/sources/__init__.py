"""Bytes to documents: archives, folders, files, tables, remote URLs and Hugging Face datasets, read as a stream.

``opening`` chooses how a source is read and parses what is read; ``readers`` walk files, ``archive`` and
``byte_stream`` one file forward; ``unpack`` bounds what bytes may become, ``wire`` knows the layouts, ``gate`` and
``fields`` let records in, repaired where their meaning is clear.
"""

from datamodules.sources.factory import Parsed, Quarantined, RawDocument, Source, open_source, parse

__all__ = ["Parsed", "Quarantined", "RawDocument", "Source", "open_source", "parse"]
