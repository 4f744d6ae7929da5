"""Reads archives, folders, files, tables, remote URLs and Hugging Face datasets as a stream of documents.

``factory`` opens a source; ``filesystem`` lists and opens its files; ``readers`` and ``huggingface`` yield raw
documents; ``byte_stream``, ``tar_reader`` and ``seek_index`` read one file forward, from any place. ``formats`` parses
a raw document; ``decompression`` decodes its bytes; ``record_validation`` and ``field_coercion`` validate its records.
"""

from datamodules.sources.factory import open_source
from datamodules.sources.formats import Parsed, Quarantined, parse
from datamodules.sources.readers import RawDocument, Source

__all__ = ["Parsed", "Quarantined", "RawDocument", "Source", "open_source", "parse"]
