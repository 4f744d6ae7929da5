"""Logs, warnings and tracebacks have no secret and no control character."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands.output_protection import shown
from tests.helpers.hostile_text import HOSTILE_TEXTS

SECRET = "s3cr3t-0123456789"
PROGRAM = """
import logging, os, sys, warnings
from commands.output_protection import protect_output
protect_output()
protect_output()
url = "https://user:s3cr3t-0123456789@host/x"
hostile = "\\x1b[31m \\x9b \\udcff \\x07"
logging.basicConfig(format="%(message)s")
logger = logging.getLogger("any")
logger.warning("log %s %s", url, hostile)
logger.warning("wrong arguments %d", url + hostile)
logging.getLogger("transformers.x").warning("coloured \\x1b[1mbold\\x1b[0m %s", url)
try:
    raise OSError(url + hostile)
except OSError:
    logger.exception("with a traceback")
warnings.warn("warning " + url + hostile)
print("printed ✓ \\udcff")
raise RuntimeError("traceback " + url + hostile)
"""


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, timeout=120,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_nothing_that_is_printed_has_a_secret_or_a_control_character(encoding):
    done = run(PROGRAM, PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    errors = done.stderr.decode(encoding)
    assert SECRET not in errors
    assert errors.count("***@host") >= 6
    for word in ("log ", "with a traceback", "warning ", "traceback ", "RuntimeError", "OSError"):
        assert word in errors
    coloured = next(line for line in errors.splitlines() if line.startswith("coloured"))
    assert "\x1b[1mbold\x1b[0m" in coloured  # colours of a library
    rest = errors.replace(coloured, "")
    assert not {character for character in rest if not character.isprintable()} - {"\n"}
    expected = "printed ✓ \\udcff\n" if encoding == "utf-8" else "printed \\u2713 \\udcff\n"
    assert done.stdout.decode(encoding) == expected


def test_an_interrupt_is_reported_as_by_python():
    done = run("from commands.output_protection import protect_output\nprotect_output()\nraise KeyboardInterrupt")
    assert b"KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_shown_text_is_printable_and_has_no_secret(text):
    line = shown(f"{text} https://user:{SECRET}@host")
    assert line.isprintable()
    assert SECRET not in line
