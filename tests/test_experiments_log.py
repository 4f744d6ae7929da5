"""The experiment log: its links resolve, and every entry has a date, a command, a commit, hardware and a result."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOG = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
TEXT = re.sub(r"```.*?```", "", LOG, flags=re.DOTALL)  # without the template of an entry
CONTENTS, *SECTIONS = re.split(r"^## ", TEXT.partition("## Contents\n")[2], flags=re.MULTILINE)
ENTRIES = [entry for section in SECTIONS for entry in re.split(r"^### ", section, flags=re.MULTILINE)[1:]]


def anchor(heading):
    """Returns the anchor that GitHub gives a heading: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def missing_parts(entry):
    """Returns the names of the parts that an entry lacks."""
    parts = {
        "date": r"\A\d{4}-\d{2}-\d{2}: \w",
        "command": r"^- Command: .",
        "commit": r"^- Commit: `[0-9a-f]{7,}`",
        "hardware": r"^- Hardware: .",
        "result": r"^- Result\b",
    }
    if "(failure)" in entry.partition("\n")[0]:
        parts["failure"] = r"^- Failure: ."
    return [name for name, pattern in parts.items() if not re.search(pattern, entry, flags=re.MULTILINE)]


def test_contents_list_every_section_in_order():
    titles = [section.partition("\n")[0] for section in SECTIONS]
    assert re.findall(r"^- \[(.+)\]\(#(.+)\)$", CONTENTS, flags=re.MULTILINE) == [(t, anchor(t)) for t in titles]


def test_links_resolve():
    anchors = [anchor(heading) for heading in re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)]
    assert len(set(anchors)) == len(anchors)
    targets = set(re.findall(r"\]\(([^)\s]+)\)", TEXT))
    assert targets
    assert not {t for t in targets if not (t[1:] in anchors if t.startswith("#") else (ROOT / t).exists())}


def test_every_entry_is_complete():
    assert ENTRIES
    assert not {entry.partition("\n")[0]: missing_parts(entry) for entry in ENTRIES if missing_parts(entry)}


def test_newest_entry_comes_first_within_a_section():
    for section in SECTIONS:
        dates = re.findall(r"^### (\d{4}-\d{2}-\d{2}):", section, flags=re.MULTILINE)
        assert dates, section.partition("\n")[0]
        assert dates == sorted(dates, reverse=True)
