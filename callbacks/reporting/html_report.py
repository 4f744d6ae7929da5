"""A run as one self-contained HTML file: what ran, on what, its curves, the table before -> after, samples.

Made from what the run left in its folder (``run.json``, ``config.yaml``, TensorBoard's events, ``evaluation*.json``):
it can be made again at any time. Pictures are inside the file; it loads nothing and runs nothing, and text of findings
stays text.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.reporting.figures import pictures
from callbacks.reporting.html_page import page
from callbacks.reporting.tables import cell, shown_rows
from callbacks.reporting.training_curves import curves
from lightning_modules.evaluation.answer_parsing import parse
from lightning_modules.evaluation.results import read_results, scores_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_modules.evaluation.evaluate import EvaluationScores

FILE = "report.html"
SAMPLES = 8  #: shown of each task
WIDTH = 1600  #: characters of a text that are shown
#: file of an evaluation -> what it measured
EVALUATIONS = {"evaluation.json": "fit", "evaluation_val.json": "validate", "evaluation_test.json": "test"}
STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d5d9de; } h3 { margin-bottom: .3rem; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .25rem .7rem; vertical-align: top; }
th { text-align: left; } tr { border-bottom: 1px solid #e8ebee; } td.n { text-align: right; white-space: nowrap; }
small { color: #5b6470; } td, pre { overflow-wrap: anywhere; } pre { white-space: pre-wrap; margin: 0; }
img { max-width: 100%; } .row { display: flex; flex-wrap: wrap; gap: 1rem; } .off { background: #fbe3e1; }
.ok { background: #e7f4ea; } details { margin: .8rem 0; } summary { cursor: pointer; }"""


def write_report(run: Path) -> Path:
    """Writes ``report.html`` into a run folder, replaced as a whole.

    Args:
        run: folder with at least one of ``run.json`` and ``evaluation.json``.

    Returns:
        The file.
    """
    body = [*_what_ran(run), *_curves(run)]
    for file, command in EVALUATIONS.items():
        for task, exam in read_results(run / file).items():
            body += _exam(task, exam, command)
    target = run / FILE
    unfinished = target.with_name(f"{FILE}.unfinished")
    title = _text(f"Run {_name(run)}")
    html = page(title, "\n".join([f"<h1>{title}</h1>", *body]), STYLE, pictures=True)
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(target)
    return target


def _what_ran(run: Path) -> Iterator[str]:
    record = _json(run / "run.json")
    if record:
        git = record.get("git") or {}
        commit = str(git.get("commit", "no checkout"))[:12] + (" with changes" if git.get("dirty") else "")
        packages = ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items())
        facts = {
            "state": f"{record.get('state')} at step {record.get('step', 0)}", "command": record.get("command"),
            "started, ended": f"{record.get('started')}, {record.get('ended', '')}", "commit": commit,
            "devices": ", ".join(record.get("devices", [])), "data": record.get("data"),
            "earlier parts of the run": len(record.get("previous", [])) or None,
            "python": f"{record.get('python')} on {record.get('platform')}", "packages": packages,
        }  # fmt: skip
        yield "<h2>What ran</h2>"
        yield _table([[_text(name), _text(value)] for name, value in facts.items() if value])
    if (run / "config.yaml").is_file():
        config = _masked((run / "config.yaml").read_text(encoding="utf-8", errors="replace"))
        yield f"<details><summary>config.yaml</summary><pre>{_text(config, 100_000)}</pre></details>"


def _curves(run: Path) -> Iterator[str]:
    drawn = curves(run)
    if drawn:
        yield "<h2>Curves</h2>"
        yield _row(drawn)


def _exam(task: str, exam: dict[str, Any], command: str) -> Iterator[str]:
    columns = {name: scores_of(column) for name, column in exam.get("columns", {}).items()}
    if not columns:
        return
    about = {name: column.get("about", {}) for name, column in exam["columns"].items()}
    yield f"<h2>{_text(task)}: {exam.get('n')} held-out questions ({_text(exam.get('split'))}, {command})</h2>"
    yield "<p>Greedy generation; small print: 95 % intervals.</p>"
    rows = [
        [_text(label.strip()), *(_cell(scores, name, form) for scores in columns.values())]
        for name, label, form in shown_rows(columns)
    ]
    yield _table(rows, ["", *(_heading(name, about[name]) for name in columns)])
    input_determined = exam.get("input_determined_categories", [])
    for group, head in (
        ("category", ["category", "findings", "input tells it"]),
        ("severity", ["severity", "findings"]),
    ):
        rows = list(_by_group(columns, group, input_determined))
        if len(rows) > 1:
            yield f"<h3>Severity accuracy by {group}</h3>"
            yield _table(rows, [*head, *map(_text, columns)])
    models = [name for name in columns if name not in exam.get("baselines", [])]
    for name in models[-2:]:
        drawn = pictures(columns[name])
        if drawn:
            yield f"<h3>{_text(name)}</h3>{_row(drawn)}"
    yield from _samples(exam.get("questions", []), {name: columns[name] for name in models})


def _by_group(
    columns: Mapping[str, EvaluationScores], group: str, input_determined: Sequence[str]
) -> Iterator[list[str]]:
    for name, figures in next(iter(columns.values())).groups[group].items():
        if "severity_accuracy" not in figures:
            continue
        accuracies = (scores.groups[group].get(name, {}) for scores in columns.values())
        cells = [_percent(accuracy.get("severity_accuracy")) for accuracy in accuracies]
        tells = [] if group == "severity" else ["yes" if name in input_determined else "no"]
        yield [_text(name), str(int(figures["answers"])), *tells, *cells]


def _samples(questions: Sequence[Mapping[str, str]], columns: Mapping[str, EvaluationScores]) -> Iterator[str]:
    if not columns or not questions:
        return
    yield "<h3>Samples</h3>"
    for index, question in enumerate(questions[:SAMPLES]):
        answers = {name: scores.outcomes[index].text for name, scores in columns.items()}
        yield f"<details{' open' if index == 0 else ''}><summary>{_text(question['content'], 120)}</summary>"
        yield f"<p><small>input</small></p><pre>{_text(question['content'])}</pre>"
        yield _table(list(_compared(question["expected"], answers)), ["key", "expected", *map(_text, answers)])
        yield "</details>"


def _compared(expected: str, answers: Mapping[str, str]) -> Iterator[list[str]]:
    """A row a key of the expected answer; what differs from it is marked. An answer that is no JSON has one row."""
    wanted, got = parse(expected) or {}, {name: parse(text) for name, text in answers.items()}
    for key in dict.fromkeys([*wanted, *(key for answer in got.values() for key in answer or {})]):
        cells = [_text(key), f"<pre>{_value(wanted, key)}</pre>"]
        for answer in got.values():
            same = answer is not None and answer.get(key) == wanted.get(key)
            text = "" if answer is None else _value(answer, key)
            cells.append(f'<pre class="{"ok" if same else "off"}">{text}</pre>')
        yield cells
    if any(answer is None for answer in got.values()):
        raw = [f"<pre>{_text(text)}</pre>" if got[name] is None else "" for name, text in answers.items()]
        yield ["no JSON", "", *raw]


def _value(answer: Mapping[str, Any], key: str) -> str:
    return _text(json.dumps(answer[key], ensure_ascii=False)) if key in answer else "<small>nothing</small>"


def _cell(scores: EvaluationScores, name: str, form: str) -> str:
    value, _, interval = cell(scores, name, form).partition("\n")
    return f"{_text(value)}<br><small>{_text(interval)}</small>" if interval else _text(value)


def _heading(name: str, about: Mapping[str, Any]) -> str:
    if name == "untuned" or "step" not in about:
        return _text(name)
    return f"{_text(name)}<br><small>{'best' if 'checkpoint' in about else 'last'} step {about['step']}</small>"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.0%}"


def _row(figures: Mapping[str, Figure]) -> str:
    images = []
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        images.append(f'<img alt="{_text(name)}" src="data:image/png;base64,{data}">')
    return f'<div class="row">{"".join(images)}</div>'


def _table(rows: Sequence[Sequence[str]], headings: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already."""
    head = f"<tr>{''.join(f'<th>{cell}</th>' for cell in headings)}</tr>" if headings else ""
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{head}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(value: Any, width: int = WIDTH) -> str:
    """Text as HTML: escaped, cut, control characters replaced."""
    text = re.sub(r"[^\n\t\x20-\x7e\xa0-\uffff\U00010000-\U0010ffff]", "\ufffd", str(value))
    return escape(text if len(text) <= width else text[: width - 1] + "…")


def _masked(config: str) -> str:
    """A config without passwords in URLs and without values of keys that say they are secret."""
    config = re.sub(r"(://)[^/@\s]+@", r"\1***@", config)
    return re.sub(r"(?im)^(\s*[\w-]*(?:key|secret|token|password):).+$", r"\1 ***", config)


def _name(run: Path) -> str:
    return "/".join(run.resolve().parts[-2:])


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
