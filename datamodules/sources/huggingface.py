"""A Hugging Face dataset as a source."""

from __future__ import annotations

from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from datamodules.errors import UserError
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.filesystem import Location, fingerprint
from datamodules.sources.readers import RawDocument, Source
from datamodules.sources.tar_reader import CHUNK_RECORDS

if TYPE_CHECKING:
    from collections.abc import Iterator


class HuggingFace(Source):
    """A Hugging Face dataset of flattened findings, streamed: only what is read is downloaded.

    Args:
        spec: ``hf://datasets/NAME[?split=train&config=NAME&revision=SHA]``; NAME may be a local folder.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        url = urlsplit(spec)
        self.name = url.path.removeprefix("/") if url.netloc == "datasets" else ""
        self.options = dict(parse_qsl(url.query))
        if not self.name or set(self.options) - {"split", "config", "revision"}:
            raise UserError(f"source {spec}: write hf://datasets/NAME?split=train (also config=, revision=)")
        self._rows()

    def raw_documents(self, start: tuple[int, int] = (0, 0)) -> Iterator[RawDocument]:
        """See :class:`Source`."""
        position = start[1]
        if start[0] > 0:
            return
        try:
            rows = iter(self._rows().skip(position))
            while batch := list(islice(rows, CHUNK_RECORDS)):
                yield RawDocument(self.spec, "", 0, position, batch)
                position += len(batch)
        except Exception as error:  # the hub's, the network's or the file format's: what was read stays
            yield RawDocument(self.spec, "", 0, position, InvalidRecord("unreadable", str(error)))

    def members(self) -> list[str]:
        """See :class:`Source`."""
        return [""]

    def fingerprint(self) -> str:
        """See :class:`Source`: a local folder's files, or the data set's commit where the hub tells it."""
        if Path(self.name).is_dir():
            identity = fingerprint(Location(self.name).files()[0])
        else:
            from huggingface_hub import HfApi

            try:
                identity = str(HfApi().dataset_info(self.name, revision=self.options.get("revision")).sha)
            except Exception:  # offline: the name has to do
                identity = ""
        text = repr((self.name, sorted(self.options.items()), identity))
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def _rows(self) -> Any:
        from datasets import load_dataset

        split = self.options.get("split", "train")
        try:
            return load_dataset(
                self.name,
                self.options.get("config"),
                split=split,
                revision=self.options.get("revision"),
                streaming=True,
            )
        except Exception as error:  # not found, gated, no such split, no network: one line each
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"source {self.spec}: no such data set or split, or no access to it ({cause})") from None
