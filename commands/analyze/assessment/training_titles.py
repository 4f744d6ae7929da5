"""Titles and categories of a run's training data, which are stored in the run folder after they are first read."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.analyze.assessment.title_index import shape
from datamodules.errors import UserError
from datamodules.files import atomic_write
from datamodules.sources import open_source, parse
from datamodules.stream.epoch_order import epoch_order, walk
from datamodules.stream.splits import input_key, split_of

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = "training_titles.json"  #: name of the file in the run folder
MAX_FINDINGS = 20_000  #: training findings that are read
GENERATED = "synthetic://"


@dataclass(frozen=True)
class TrainingTitles:
    """Titles and categories of training findings.

    Attributes:
        titles: distinct shapes of titles, see :func:`.title_index.shape`.
        categories: distinct categories, as in the data.
        findings: number of findings that were read.
    """

    titles: tuple[str, ...]
    categories: tuple[str, ...]
    findings: int


def training_titles(run: Path, options: Mapping[str, Any]) -> TrainingTitles | None:
    """Returns the titles of the first :data:`MAX_FINDINGS` training findings of a run.

    The sources are read once, and the result is stored as ``training_titles.json`` in the run folder. Only local and
    generated sources are read, because ``analyze`` uses no network.

    Args:
        run: run folder.
        options: ``data.init_args`` of the run's config.

    Returns:
        None if a source is remote, missing or unreadable and the run has no stored titles.
    """
    if stored := _load(run / FILE):
        return stored
    sources = [str(source) for source in options.get("sources") or []]
    if not sources or not all(source.startswith(GENERATED) or Path(source).expanduser().exists() for source in sources):
        return None
    try:
        titles = _read(sources, options)
    except (UserError, OSError, ValueError):
        return None
    if not titles.findings:
        return None
    with suppress(OSError):  # the folder may be read-only
        record = {"titles": titles.titles, "categories": titles.categories, "findings": titles.findings}
        atomic_write(run / FILE, json.dumps(record) + "\n")
    return titles


def _load(file: Path) -> TrainingTitles | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        titles, categories = (tuple(map(str, record[name])) for name in ("titles", "categories"))
        return TrainingTitles(titles, categories, int(record["findings"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(sources: list[str], options: Mapping[str, Any]) -> TrainingTitles:
    seed = int(options.get("seed") or 0)
    fractions = {name: float(options.get(name) or 0.0) for name in ("val_fraction", "test_fraction")}
    opened = [open_source(source) for source in sources]
    titles: set[str] = set()
    categories: set[str] = set()
    count = 0
    for _, _, raw in walk(opened, epoch_order(opened, epoch=0, seed=seed)):
        assert raw is not None  # no cache is used
        for finding in parse(raw).document.findings:
            if split_of(input_key(finding), seed=seed, **fractions) == "train":
                titles.add(shape(finding.title))
                categories.add(finding.category)
                count += 1
        if count >= MAX_FINDINGS:
            break
    return TrainingTitles(tuple(sorted(titles)), tuple(sorted(categories)), count)
