"""Names of reports: relative paths that are safe and distinct, so that each names a result in one folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

SET_ASIDE = "set_aside.json"  #: list of the reports that can't be read; no result has this name
NAME_BYTES = 120  #: largest length of one part of a name; file systems allow 255, of which suffixes need some
NAME_PARTS = 8  #: largest number of parts of a name


def work_names(output: str) -> tuple[str, ...]:
    """Returns the names of the files and folders that are kept next to an output file of a name."""
    return f"{output}.partial", f"{output}.partial.jsonl", f"{output}.{SET_ASIDE}"


def distinct_names(names: Sequence[str]) -> list[str]:
    """Returns safe names in the same order that are distinct as results, also if the file system ignores case.

    A name that is taken gets a numbered folder: "host.json" becomes "2/host.json".

    Args:
        names: any paths.
    """
    files, folders = {SET_ASIDE}, set[str]()
    numbers: Counter[str] = Counter()  # of each name, so that thousands of equal names take no quadratic time
    distinct = []
    for original in names:
        path = name = safe_name(original)
        while _results(name) & files or _results(name) & folders or _parents(name) & files:
            numbers[path] += 1
            name = f"{numbers[path] + 1}/{path}"
        files |= _results(name)
        folders |= _parents(name)
        distinct.append(name)
    return distinct


def safe_name(name: str) -> str:
    """Returns a relative path without "..", separators of other systems and unprintable characters.

    Args:
        name: any path, for example of a member of an archive that another person wrote.
    """
    parts = []
    for part in name.replace("\\", "/").split("/"):
        clean = "".join(char if char.isprintable() and char not in ':*?"<>|' else "_" for char in part).strip()
        if len(clean.encode()) > NAME_BYTES:
            digest = hashlib.blake2b(part.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
            clean = clean.encode()[: NAME_BYTES - 13].decode("utf-8", "ignore") + "_" + digest
        if clean.strip(". "):
            parts.append(clean.lstrip(".") if clean.startswith(".") else clean)
    return "/".join(parts[-NAME_PARTS:]) or "report"


def _results(name: str) -> set[str]:
    stem = name.casefold().removesuffix(".json")
    return {stem + suffix for suffix in (".json", ".md", ".html")}


def _parents(name: str) -> set[str]:
    parts = name.casefold().split("/")
    return {"/".join(parts[:end]) for end in range(1, len(parts))}
