"""Recognises findings that are signs of an intrusion, by their text and metadata.

The kinds follow techniques of MITRE ATT&CK for Linux: T1574.006 (dynamic linker hijacking), T1548.001 (setuid and
setgid), T1571 (non-standard port), T1070.004 and T1036 (file deletion, masquerading), T1547.006 and T1014 (kernel
modules, rootkits).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from datamodules.tasks.base import compact_json
from datamodules.tasks.remediation import ALIASES

if TYPE_CHECKING:
    from datamodules.records import Finding

INTRUSION = "intrusion"  #: name of the rule that correlates signs of different kinds
MAX_SEARCHED = 4096  #: characters of a finding that are searched

_SHELL = r"(?:\.?(?:ba|da|z|k|c|tc|fi|a)?sh|busybox|python[\d.]*|perl|ruby|lua|php|socat|ncat|netcat|nc|find|vim?|nmap)"
_WRITABLE = r"/(?:tmp|var/tmp|dev/shm|run/shm)/"
_SUID = re.compile(r"\b(?:suid|sgid|setuid|setgid)\b|\b[246]7[0-7]{2}\b")
#: a shell or interpreter as the last part of a path, also as a copy such as bash.bak or .bash-1, or a file in a
#: directory that is open to all users
_SUID_FILE = re.compile(rf'(?:/{_SHELL}(?:[._-][\w.-]*)?(?=["\s,:]|$))|{_WRITABLE}|/home/[^/"\s]+/')
_PRELOAD = re.compile(r"\bld_(?:preload|audit)\b|\bld\.so\.preload\b|\bpreload(?:ed)? (?:shared )?(?:library|object)")
_LISTENS = re.compile(
    r"\blisten(?:s|ing|er)?\b|\bbind shell\b|\breverse[- _]?shell\b|\bopen port\b|\bport \d+ (?:is )?open\b"
)
#: ports of usual remote shells and control channels
_SHELL_PORT = re.compile(
    r"(?<![\d.])(?:1337|2323|4242|4443|4444|4445|5554|5555|6666|6667|7777|9001|9999|12345|31337|54321)(?![\d.])"
)
_SHELL_PROCESS = re.compile(rf'"(?:process|command|exe|executable|program)":"(?:[^"]*/)?{_SHELL}(?:[\s"])')
_GONE = re.compile(r"\bdeleted (?:binary|executable)\b|\(deleted\)|\bdeleted(?:_executable)?\":\"?true")
_FROM_WRITABLE = re.compile(rf'world[_-]writable[_ ]executable\":\"?true|"(?:command|exe|executable)":"{_WRITABLE}')
_HIDDEN_MODULE = re.compile(
    r"\bhidden (?:kernel )?module\b|\brootkit\b|\bmodule\b[^\n]*\b(?:unsigned|hidden|out[- ]of[- ]tree)\b"
)

#: kinds of signs, in the order of a title
SIGNS = ("preloaded library", "SUID shell", "shell port", "untrusted program", "suspicious module")


def signs_of(finding: Finding) -> list[str]:
    """Returns the kinds of signs that a finding shows, from :data:`SIGNS`; usually none.

    Args:
        finding: with the title, description, metadata and id of the scanner.
    """
    text = f"{finding.title}\n{finding.description}\n{finding.id}\n{compact_json(finding.metadata)}"
    text = text[:MAX_SEARCHED].lower()
    category = ALIASES.get(finding.category, finding.category)
    preload, suid, port, gone, module = SIGNS
    found = {
        preload: _PRELOAD.search(text) is not None,
        suid: (category == "suid" or _SUID.search(text) is not None) and _SUID_FILE.search(text) is not None,
        port: _LISTENS.search(text) is not None and _is_shell_port(text),
        gone: _GONE.search(text) is not None or _FROM_WRITABLE.search(text) is not None,
        module: finding.severity != "info" and category == "modules" and _HIDDEN_MODULE.search(text) is not None,
    }
    return [name for name in SIGNS if found[name]]


def _is_shell_port(text: str) -> bool:
    return _SHELL_PORT.search(text) is not None or _SHELL_PROCESS.search(text) is not None
