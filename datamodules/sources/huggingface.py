"""Source that streams a Hugging Face dataset."""

from __future__ import annotations

from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from datamodules.errors import UserError, one_line
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.filesystem import Location, fingerprint
from datamodules.sources.readers import RawDocument, Source
from datamodules.sources.tar_reader import CHUNK_RECORDS

if TYPE_CHECKING:
    from collections.abc import Iterator


class HuggingFace(Source):
    """A Hugging Face dataset of flattened findings; only the rows that are read are downloaded.

    Args:
        spec: ``hf://datasets/NAME[?split=train&config=NAME&revision=SHA]``; NAME may be a local folder.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        url = urlsplit(spec)
        self.name = url.path.removeprefix("/") if url.netloc == "datasets" else ""
        self.options = dict(parse_qsl(url.query))
        if not self.name or set(self.options) - {"split", "config", "revision"}:
            raise UserError(
                f"data.sources={spec}: wrong form. Fix: write hf://datasets/NAME?split=train (also config=, revision=)"
            )
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
        except Exception as error:  # of the hub, the network or the file format; the rows before it stay usable
            yield RawDocument(self.spec, "", 0, position, InvalidRecord("unreadable", str(error)))

    def members(self) -> list[str]:
        """See :class:`Source`."""
        return [""]

    def fingerprint(self) -> str:
        """See :class:`Source`: of a local folder's files, or of the dataset's commit if the hub can be reached."""
        if Path(self.name).is_dir():
            identity = fingerprint(Location(self.name).files()[0])
        else:
            from huggingface_hub import HfApi

            try:
                identity = str(HfApi().dataset_info(self.name, revision=self.options.get("revision")).sha)
            except Exception:  # offline: only the name is known
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
        except Exception as error:  # not found, gated, no such split, no network
            raise UserError(
                f"data.sources={self.spec}: no such data set or split, or no access to it ({one_line(error)}). Fix: "
                "check the name, the split, the network and HF_TOKEN"
            ) from None
