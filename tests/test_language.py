"""Phrases that were removed from code and documents do not come back; see the language rule in CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("datamodules", "lightning_modules", "optimizers", "callbacks", "commands", "configs", "benchmarks", "docs",
           "notebooks", "tests", ".github")  # fmt: skip
#: pattern -> what to write instead
PHRASES = {
    r"besides?": "in addition to, next to",
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix, repair",
    r"nobody|everybody": "name who does it",
    r"go(es|ing)? on|went on": "continue",
    r"held to|holds? (it|them) (to|against)": "constrained by, compared with",
    r"stands? (in|for)": "replace, represent",
    r"lies? (in|at|beside|behind|there|where)": "is stored in, is",
    r"is none of": "must be one of",
    r"so many": "this number of",
    r"told": "determined, given",
    r"houses?|doctor|doorkeeper": "name the code object",
    r"way out": "fix",
    r"foresees?|foreseen": "estimate",
    r"ledger|inquiry|gauges?|exams?": "the field's term",
    r"worth": "quality",
    r"not served": "not supported",
}
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".ipynb", ".cff"}
FILES = sorted(
    file
    for start in [*(ROOT / folder for folder in FOLDERS), ROOT]
    for file in (start.glob("*") if start == ROOT else start.rglob("*"))
    if file.suffix in SUFFIXES and file != Path(__file__) and file.name != "LICENSE"
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_removed_phrase(file):
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        for phrase, instead in PHRASES.items():
            match = re.search(rf"(?<![\w/-])({phrase})(?![\w-])", line, re.IGNORECASE)
            if match and "language: keep" not in line:
                found.append(f"{number}: {match[0]!r}: write {instead!r}")
    assert not found


def test_the_files_were_found():
    assert len(FILES) > 250
