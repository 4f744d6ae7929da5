"""Raw documents to prepared documents: parsing, splitting, pairs and token ids. A reading process runs this.

A prepared document depends only on the document and the settings, not on the epoch, the worker or the rank. So any
worker can prepare it, and the token cache can store it.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datamodules.errors import UserError
from datamodules.pretrained.locate import cache_root
from datamodules.records import SEVERITIES
from datamodules.sources import Quarantined, Source, open_source, parse
from datamodules.stream.dedup import merge_conflicts
from datamodules.stream.epoch_order import Place, Unit, epoch_order, walk
from datamodules.stream.example_columns import Columns
from datamodules.stream.splits import Split, split_document
from datamodules.tasks import Pair, Task, build_tasks
from datamodules.tokenization.chat_format import ChatFormat, Example, load_tokenizer

if TYPE_CHECKING:
    from datamodules.records import Document
    from datamodules.sources import RawDocument

Conflicts = Literal["keep", "drop", "merge"]

MAX_PAIRS_READ = 50  #: pairs that :func:`first_pairs` reads per requested pair, if a severity is rarer than that


@dataclass(slots=True)
class PreparedDocument:
    """Examples of a document, and its counters.

    Attributes:
        place: start of the document in the epoch's order.
        columns: its examples of one split, of all tasks.
        records: number of its records of all splits, with the quarantined ones.
        counts: number of repaired, merged and skipped records (``repaired.<kind>``, ``merged``, ``skipped.<reason>``).
        quarantined: records that can't be used.
    """

    place: Place
    columns: Columns
    records: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    quarantined: list[Quarantined] = field(default_factory=list)


class DocumentProcessor:
    """Turns documents into token ids. Sources and tokenizer are opened at their first use, in each process separately.

    Args:
        sources: specifications of the sources.
        tokenizer: name or path of the tokenizer.
        tasks: names of the tasks.
        val_fraction: fraction of findings for validation.
        test_fraction: fraction of findings for test.
        seed: seed of the split.
        conflicts: ``merge`` gives equal inputs of a document one answer.
        risk_rationale: whether answers of the risk task have a rationale.
        storage_options: options of fsspec for remote sources.
        cache_dir: folder for the indexes of sources. None uses the user's cache folder, so that resuming never reads an
            archive from its start.
    """

    def __init__(
        self,
        *,
        sources: Sequence[str],
        tokenizer: str,
        tasks: Sequence[str],
        val_fraction: float,
        test_fraction: float,
        seed: int,
        conflicts: Conflicts = "keep",
        risk_rationale: bool = False,
        storage_options: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.specs, self.tokenizer, self.task_names = list(sources), tokenizer, list(tasks)
        self.val_fraction, self.test_fraction, self.seed, self.conflicts = val_fraction, test_fraction, seed, conflicts
        self.risk_rationale, self.storage_options, self.cache_dir = risk_rationale, storage_options, cache_dir
        self._close()

    def _close(self) -> None:
        self._chat: ChatFormat | None = None
        self._tasks: dict[str, Task] | None = None
        self._sources: list[Source] | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_chat": None, "_tasks": None, "_sources": None}

    @property
    def chat(self) -> ChatFormat:
        """The tokenizer's chat format."""
        if self._chat is None:
            self._chat = ChatFormat(load_tokenizer(self.tokenizer))
        return self._chat

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by name."""
        if self._tasks is None:
            self._tasks = build_tasks(self.task_names, rationale=self.risk_rationale)
        return self._tasks

    @property
    def sources(self) -> list[Source]:
        """Opened sources.

        Raises:
            UserError: there is no source, or one is missing, empty or of an unsupported kind.
        """
        if self._process != os.getpid():  # a forked worker shares open files, and their offsets, with its parent
            self._sources, self._process = None, os.getpid()
        if not self.specs:
            raise UserError(
                "data.init_args.sources=[]: no source. Fix: name an archive, a folder or a file of findings"
            )
        if self._sources is None:
            cache_dir = Path(self.cache_dir) if self.cache_dir else cache_root()
            options = self.storage_options
            self._sources = [open_source(s, storage_options=options, cache_dir=cache_dir) for s in self.specs]
        return self._sources

    def prepare(self, place: Place, raw: RawDocument, split: Split) -> PreparedDocument:
        """Returns the examples of one split."""
        parsed = parse(raw)
        document, merged = self._part(parsed.document, split)
        counts = Counter({f"repaired.{kind}": n for kind, n in parsed.repairs.items()})
        if merged:
            counts["merged"] = merged
        examples: list[Example] = []
        for task in self.tasks.values():
            if pairs := list(task.pairs(document)):
                examples += self.chat.encode(task, pairs)
            counts.update({f"skipped.{reason}": n for reason, n in take_skipped(task).items()})
        return PreparedDocument(place, Columns.of(examples), parsed.records, counts, parsed.quarantined)

    def pairs(self, raw: RawDocument, task: str, split: Split) -> list[Pair]:
        """Returns the pairs of one split and task, not encoded."""
        return list(self.tasks[task].pairs(self._part(parse(raw).document, split)[0]))

    def _part(self, document: Document, split: Split) -> tuple[Document, int]:
        # equal inputs are in the same split, so merging after the split gives the same result with less work
        part = split_document(
            document, val_fraction=self.val_fraction, test_fraction=self.test_fraction, seed=self.seed
        )[split]
        return merge_conflicts(part) if self.conflicts == "merge" else (part, 0)

    def read_again(self, unit: Unit, position: int) -> RawDocument:
        """Reads one document again, to rebuild a file of the token cache."""
        return next(self.sources[unit.source].read_member(unit.member, position))


def take_skipped(task: Task) -> dict[str, int]:
    """Returns and resets the number of records that a task skipped in the last document, by reason."""
    skipped: Counter[str] = getattr(task, "skipped", None) or Counter()
    counts = dict(skipped)
    skipped.clear()
    return counts


def first_pairs(
    processor: DocumentProcessor, split: Split, task: str, limit: int, *, balanced: bool, seed: int
) -> list[Pair]:
    """Returns distinct pairs from the first documents of a split, in the order of epoch 0, without token ids.

    The pairs of these documents are sampled at random with the given seed: a document's findings are sorted by
    category, and the first fifty of a large document all have the same one.

    Args:
        processor: opens sources and tasks.
        split: the split to read.
        task: name of the task.
        limit: largest number of pairs.
        balanced: return equal numbers of each severity, as far as the first :data:`MAX_PAIRS_READ` times ``limit``
            pairs contain them; pairs of other severities replace missing ones.
        seed: seed of order and sample.
    """
    chosen: dict[str, list[Pair]] = defaultdict(list)
    seen: set[str] = set()
    quota = -(-limit // len(SEVERITIES)) if balanced else limit
    for _, _, raw in walk(processor.sources, epoch_order(processor.sources, epoch=0, seed=seed)):
        assert raw is not None  # no cache is used
        for pair in processor.pairs(raw, task, split):
            if pair.content not in seen:
                seen.add(pair.content)
                chosen[pair.severity if balanced else ""].append(pair)
        available = sum(min(len(pairs), quota) for pairs in chosen.values())
        if available >= limit or len(seen) >= MAX_PAIRS_READ * limit:
            break
    for pairs in chosen.values():
        pairs.sort(key=lambda pair: blake2b(f"{seed} {pair.content}".encode(), digest_size=8).digest())
    first = [pair for pairs in chosen.values() for pair in pairs[:quota]]
    rest = [pair for pairs in chosen.values() for pair in pairs[quota:]]
    return (first + rest)[:limit]
