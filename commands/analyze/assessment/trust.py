"""Compares the model's severities with the scanner's, so that no output hides a disagreement.

A finding is *lowered* if the model rates it two or more levels below the scanner, or below high if the scanner rates it
high or critical. Lowered findings are listed first in every report. Sentences of a model's answer that play the danger
down are not used while the scanner or the model rates any finding medium or above.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from datamodules.errors import UserError
from datamodules.records import SEVERITIES

if TYPE_CHECKING:
    from datamodules.sources.formats import Parsed

#: severity that decides: the scanner's, the model's, or the higher one of the two
Trust = Literal["scanner", "model", "higher"]
LEVELS = {name: level for level, name in enumerate(SEVERITIES)}
SHOWN_LOWERED = 10  #: lowered findings that the console lists; files list all of them
MAX_DEPTH = 12  #: nesting depth to which unreadable findings are searched

#: expressions that play danger down; a false match costs one sentence of the model, which a rule replaces
_CALMING = re.compile(
    r"\b(?:no|nothing|none|without|zero|hardly any|free of)\b(?:\W+\w+){0,4}?\W+(?:urgent|urgency|actions?|attention|"
    r"threats?|risks?|concerns?|issues?|problems?|remediation|danger(?:ous)?|compromise|intrusion|indicators?|evidence|"
    r"malicious|suspicious|critical|severe|serious|high|findings?|harm|worry|do|fix)\b"
    r"|\b(?:not|never|\w+n't)\b(?:\W+\w+){0,3}?\W+(?:urgent|dangerous|malicious|suspicious|critical|severe|serious|"
    r"harmful|concerning|worrying|compromised|infected|threats?|risks?|concerns?|problems?|needs?|needed|requires?|"
    r"required|warrant|necessary|actions?|attention|worry|panic)\b"
    r"|\b(?:harmless|benign|innocuous|negligible|trivial|minor|ignored?|disregard|false[- ](?:positives?|alarms?)|"
    r"all clear|routine|informational|low[- ](?:risk|priority|severity)|under control|can wait|be deferred|"
    r"unproblematic|uncompromised|unaffected|as the baseline|keep this state|when convenient)\b"
    r"|\b(?:is|are|looks?|appears?|seems?|remains?)(?: \w+)? (?:safe|secure|clean|healthy|fine|good|ok|okay|normal|"
    r"expected|stable|intact)\b"
    r"|\b(?:0|zero|none) of (?:the )?\d+\b",
    re.IGNORECASE,
)


def is_calming(text: str) -> bool:
    """Returns whether a text has an expression that plays danger down, such as "No urgent action"."""
    return _CALMING.search(" ".join(text.split())) is not None


def higher(first: str, second: str) -> str:
    """Returns the higher one of two severities."""
    return max(first, second, key=LEVELS.__getitem__)


def is_lowered(scanner: str, model: str | None) -> bool:
    """Returns whether the model lowers a severity of the scanner so far that a report lists the finding first.

    Args:
        scanner: severity in the report.
        model: severity of the model's answer; None if there is no valid answer.
    """
    if model is None:
        return False
    below = LEVELS[scanner] - LEVELS[model]
    return below >= 2 or (LEVELS[scanner] >= LEVELS["high"] > LEVELS[model])


def counts_text(severities: Iterable[str]) -> str:
    """Returns the counts by severity as text: "1 critical, 3 low"."""
    counts = Counter(severities)
    return ", ".join(f"{counts[name]} {name}" for name in reversed(SEVERITIES) if counts[name])


def require_readable(value: Any, parsed: Parsed, name: str) -> None:
    """Raises an error if a report shows findings of which none could be read, so that it never counts as harmless.

    Args:
        value: JSON value of the report.
        parsed: the readable part of the report.
        name: the option and the file, for the message.

    Raises:
        UserError: the report holds or counts findings, and none is readable.
    """
    if parsed.document.findings:
        return
    if parsed.quarantined:
        first = parsed.quarantined[0]
        problem = f"{first.reason} {first.detail}".rstrip()
        raise UserError(
            f"{name}: none of its {len(parsed.quarantined)} findings is usable; number {first.position + 1}: "
            f"{problem}. Fix: give the scanner's unchanged JSON output."
        )
    if visible := count_visible(value):
        raise UserError(
            f"{name}: none of its {visible} findings could be read: their place in the file is unknown. "
            "Fix: give the scanner's unchanged JSON output."
        )


def count_visible(value: Any, depth: int = 0) -> int:
    """Returns the number of findings that a JSON value holds anywhere, or that its own counters state.

    A finding is an object with a title and a severity. The counters are ``finding_count`` (also with the suffix
    ``_total`` or ``_emitted``).
    """
    if depth > MAX_DEPTH:
        return 0
    if isinstance(value, list):
        return sum(count_visible(item, depth + 1) for item in value)
    if not isinstance(value, dict):
        return 0
    if "title" in value and "severity" in value:
        return 1
    counters = ("finding_count", "finding_count_total", "finding_count_emitted")
    # scanners write numbers as strings too
    stated = [int(str(value[name])) for name in counters if str(value.get(name, "")).isdecimal()]
    inside = [count_visible(item, depth + 1) for item in value.values()]
    # the summary and the results of a report count the same findings
    return max(*stated, *inside, 0) if stated or "results" in value else sum(inside)
