"""Values of a finding in the commands of the remediation table.

A value is inserted only if it is plainly a process id, a port, an address, a name or a path without characters that a
shell interprets (``shlex.quote`` returns it unchanged) and has at most :data:`MAX_VALUE` characters, so that text that
an attacker wrote never becomes part of a command.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datamodules.records import Finding

MAX_VALUE = 96  #: characters of a value in a command
MAX_SEARCHED = 4096  #: characters of a text that are searched for a value

_IPV4 = re.compile(r"(?!0\.|127\.)(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}", re.ASCII)
_PATH = re.compile(r"(?!.*\.\.)(?:/[A-Za-z0-9._+][A-Za-z0-9._+-]{0,63}){2,8}", re.ASCII)
_LIBRARY = r"(?!.*\.\.)(?:/[A-Za-z0-9._+][A-Za-z0-9._+-]{0,63}){1,8}(?<=[A-Za-z0-9_+-])\.so(?:\.\d{1,4}){0,3}"
_LIBRARY_FIELDS = ("library", "value", "preload", "ld_preload", "LD_PRELOAD", "path", "file")

#: placeholder: the metadata fields that may fill it, and the pattern that the whole value must match
VALUES = {
    "pid": (("pid",), re.compile(r"(?!1$)[1-9]\d{0,6}", re.ASCII)),  # never 0 (a whole process group) or 1 (init)
    "port": (("port",), re.compile(r"[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]", re.ASCII)),
    "ip": (("foreign_address", "remote_ip", "ip"), _IPV4),
    "client_ip": (("client_ip",), _IPV4),
    "domain": (("domain", "query"), re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?", re.ASCII | re.IGNORECASE)),
    "user": (("account", "user"), re.compile(r"(?!root$)[a-z_][a-z0-9_-]{0,31}", re.ASCII)),
    "module": (("module",), re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,55}", re.ASCII)),
    "path": (("path", "file", "file_path", "filename"), _PATH),
    "mode": (("mode", "permissions"), re.compile(r"0?[2-7][0-7]{3}", re.ASCII)),  # of a setuid or setgid file
    "program": (("exe", "executable", "path", "file"), _PATH),
    "library": (_LIBRARY_FIELDS, re.compile(_LIBRARY, re.ASCII)),
    # A library of the system is never moved: without libc no program starts.
    "planted_library": (_LIBRARY_FIELDS, re.compile(rf"(?!/(?:usr/)?(?:local/)?lib(?:x?32|64)?/){_LIBRARY}", re.ASCII)),
    "parameter": (("parameter", "key"), re.compile(r"[a-z][a-z0-9_.-]{2,63}", re.ASCII)),
}
PLACEHOLDER = re.compile("{(" + "|".join((*VALUES, "evidence")) + ")}")
_IN_TITLE = {
    "port": re.compile(r"\b(?:port|tcp|udp) (\d+)\b", re.IGNORECASE),
    "module": re.compile(r"\bmodule (\S+)$", re.IGNORECASE),
    "parameter": re.compile(r"^(?:/\S*/)?([^/\s]+)$"),
}
_PATH_IN_TITLE = re.compile(r"(?:^|\s)(/\S+)")
_COPY = re.compile(r"\bcop(?:y|ies) of\b", re.IGNORECASE)
_PRELOADED = re.compile(r"(?:LD_PRELOAD|LD_AUDIT)[=:\s]+(/[^\s\"':;,]+)")


def fill_placeholders(text: str, finding: Finding, evidence: str) -> str | None:
    """Returns the text with its placeholders replaced by values of the finding; None if one has no value."""
    if "{" not in text:
        return text
    values = {name: _value(name, finding) for name in set(PLACEHOLDER.findall(text)) - {"evidence"}}
    if None in values.values():
        return None
    return PLACEHOLDER.sub(lambda match: evidence if match[1] == "evidence" else str(values[match[1]]), text)


def _value(name: str, finding: Finding) -> str | None:
    fields, allowed = VALUES[name]
    candidates = [str(finding.metadata[field]) for field in fields if field in finding.metadata]
    if name == "ip":
        candidates = [candidate.rpartition(":")[0] or candidate for candidate in candidates]
    if name == "program" and isinstance(command := finding.metadata.get("command"), str):
        candidates.append(command.split(" ", 1)[0])
    if allowed is _PATH and (path := path_of_id(finding)):
        candidates.append(path)
    if allowed is _PATH:
        candidates += _paths_in_title(finding.title[:MAX_SEARCHED])
    if name in _IN_TITLE and (match := _IN_TITLE[name].search(finding.title[:MAX_SEARCHED])):
        candidates.append(match[1])
    if fields is _LIBRARY_FIELDS:
        parts = (finding.title, finding.description, *map(str, finding.metadata.values()))
        candidates += [match[1] for text in parts if (match := _PRELOADED.search(text[:MAX_SEARCHED]))]
    return next((text for text in candidates if len(text) <= MAX_VALUE and allowed.fullmatch(text)), None)


def _paths_in_title(title: str) -> list[str]:
    """Returns the path in a title; none if it is unclear which of two files, or a file's copy, the finding means."""
    paths = _PATH_IN_TITLE.findall(title)
    return paths if len(paths) == 1 and not _COPY.search(title) else []


def path_of_id(finding: Finding) -> str | None:
    """Returns the finding's id if it is the path of a file that neither the title nor the metadata contain."""
    path = finding.id
    if len(path) > MAX_VALUE or not _PATH.fullmatch(path) or path.startswith("/proc/") or path in finding.title:
        return None
    return None if any(key in finding.metadata for key in ("path", "file")) else path
