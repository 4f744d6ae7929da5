"""Generates the part of docs/data_pipeline.md about the tasks: texts, schemas and one example of each.

``python -m tests.helpers.pipeline_examples`` prints it.
"""

import re

import orjson

from datamodules.records import Document
from datamodules.sources.formats import Reader
from datamodules.synthetic import iter_documents
from datamodules.tasks import TASKS, Pair, Task, build_tasks
from datamodules.tasks.base import SYSTEM


def example_document() -> Document:
    """Three generated findings: a process and a network socket of one correlation, and a finding that is unrelated."""
    reader = Reader("synthetic", "", 0)
    reader.read_value(orjson.loads(orjson.dumps(next(iter_documents(300, 1)))))
    document = reader.parsed.document
    correlation = next(c for c in document.correlations if "process_network_suspicious" in c.tags)
    findings = [finding for finding in document.findings if finding.id in correlation.finding_ids]
    other = next(finding for finding in document.findings if finding.category == "suid" and finding.severity == "high")
    return Document("synthetic", "", 0, [*findings, other], [correlation])


def example_pairs() -> dict[str, tuple[Task, Pair]]:
    """Each task with the pair of the last finding or of the whole document."""
    document = example_document()
    return {name: (task, list(task.pairs(document))[-1]) for name, task in build_tasks(TASKS).items()}


def describe(schema: dict) -> str:
    """A JSON Schema of an answer on one line."""
    kind = schema["type"]
    if "enum" in schema:
        return " / ".join(schema["enum"])
    if kind == "string":
        return f"string of at most {schema['maxLength']} characters"
    if kind == "array":
        return f"list of at most {schema['maxItems']}: {describe(schema['items'])}"
    if kind == "object":
        parts = (
            f"{name}{'' if name in schema['required'] else '?'}: {describe(part)}"
            for name, part in schema["properties"].items()
        )
        return f"{{{'; '.join(parts)}}}"
    return f"{kind} from {schema['minimum']} to {schema['maximum']}"


def section(task: Task, pair: Pair) -> str:
    lines = [
        f"### {task.name}",
        "",
        "```text",
        *wrap(task.instruction),
        *wrap(pair.content),
        "```",
        "",
        "Completion:",
        "",
    ]
    lines += ["```json", *wrap(pair.completion), "```", "", "Schema (`?` marks optional keys):", ""]
    for name, part in task.answer_schema["properties"].items():
        optional = "" if name in task.answer_schema["required"] else "?"
        lines.append(f"- `{name}{optional}`: {describe(part)}")
    return "\n".join([*lines, ""])


def wrap(text: str) -> list[str]:
    """Breaks long lines after a space or a comma, at 118 characters at most if possible."""
    lines: list[str] = []
    for line in text.splitlines():
        lines.append("")
        for piece in re.split(r"(?<=[, ])", line):
            if len(lines[-1]) + len(piece) > 118:
                lines.append("")
            lines[-1] += piece
    return [line.rstrip() for line in lines]


def system_text() -> str:
    return "\n".join(["```text", *wrap(SYSTEM), "```"])


def task_sections() -> list[str]:
    return [section(task, pair) for task, pair in example_pairs().values()]


if __name__ == "__main__":
    print(system_text(), *task_sections(), sep="\n\n")
