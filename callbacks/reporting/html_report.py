"""Report of a run as one self-contained HTML file: run record, curves, comparison tables and samples.

The report is built from the files of the run directory (``run.json``, ``config.yaml``, TensorBoard's events,
``evaluation*.json``), so it can be written again at any time. Images are embedded. The page loads no resources and runs
no scripts, and text of findings is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from callbacks.reporting.figures import draw_figures
from callbacks.reporting.html_page import page
from callbacks.reporting.tables import format_cell, informative_rows, weights_label
from callbacks.reporting.training_curves import draw_curves
from datamodules.files import atomic_write
from datamodules.output_text import html
from datamodules.redaction import redact, redact_text
from lightning_modules.evaluation.answer_parsing import parse
from lightning_modules.evaluation.results import read_results, scores_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_modules.evaluation.evaluate import EvaluationScores

REPORT_FILE = "report.html"
SAMPLES = 8  #: questions shown per task
WIDTH = 1600  #: characters of a text after which it is cut
#: evaluation file -> command that wrote it
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
    """Writes ``report.html`` into a run directory in one step.

    Args:
        run: run directory with at least one of ``run.json`` and ``evaluation.json``.

    Returns:
        Path of the report.
    """
    body = [*_section("run.json", _run_section(run)), *_curves_section(run)]
    for file, command in EVALUATIONS.items():
        for task, record in read_results(run / file).items():
            body += _section(f"{file}, task {task}", _task_section(task, record, command))
    target = run / REPORT_FILE
    title = _text(f"Run {_run_name(run)}")
    atomic_write(target, page(title, "\n".join([f"<h1>{title}</h1>", *body]), STYLE, pictures=True))
    return target


def _section(origin: str, parts: Iterator[str]) -> list[str]:
    """Returns the HTML of a section; a message if its file is damaged, which must not end a fit."""
    try:
        return list(parts)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        return [f"<p>{_text(f'{origin}: damaged ({type(error).__name__}: {error})')}</p>"]


def _run_section(run: Path) -> Iterator[str]:
    record = redact(_read_json(run / "run.json"))
    if record:
        git = record.get("git") or {}
        commit = str(git.get("commit", "not a checkout"))[:12] + (" with local changes" if git.get("dirty") else "")
        packages = ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items())
        facts = {
            "state": f"{record.get('state')} at step {record.get('step', 0)}", "command": record.get("command"),
            "started, ended": f"{record.get('started')}, {record.get('ended', '')}", "commit": commit,
            "devices": ", ".join(record.get("devices", [])), "data": record.get("data"),
            "earlier parts of the run": len(record.get("previous", [])) or None,
            "python": f"{record.get('python')} on {record.get('platform')}", "packages": packages,
        }  # fmt: skip
        yield "<h2>Run</h2>"
        yield _table([[_text(name), _text(value)] for name, value in facts.items() if value])
    if (run / "config.yaml").is_file():
        config = _config((run / "config.yaml").read_text(encoding="utf-8", errors="replace"))
        yield f"<details><summary>config.yaml</summary><pre>{_text(config, 100_000)}</pre></details>"


def _curves_section(run: Path) -> Iterator[str]:
    drawn = draw_curves(run)
    if drawn:
        yield "<h2>Curves</h2>"
        yield _image_row(drawn)


def _task_section(task: str, record: dict[str, Any], command: str) -> Iterator[str]:
    columns = {name: scores_of(column) for name, column in record.get("columns", {}).items()}
    if not columns:
        return
    about = {name: column.get("about", {}) for name, column in record["columns"].items()}
    count, split = _text(record.get("n")), _text(record.get("split"))
    yield f"<h2>{_text(task)}: {count} held-out questions ({split}, {command})</h2>"
    yield "<p>Greedy generation. Small text: 95 % intervals.</p>"
    rows = [
        [_text(label.strip()), *(_cell(scores, name, form) for scores in columns.values())]
        for name, label, form in informative_rows(columns)
    ]
    yield _table(rows, ["", *(_heading(name, about[name]) for name in columns)])
    input_determined = record.get("input_determined_categories", [])
    for group, head in (
        ("category", ["category", "findings", "determined by input"]),
        ("severity", ["severity", "findings"]),
    ):
        rows = list(_by_group(columns, group, input_determined))
        if len(rows) > 1:
            yield f"<h3>Severity accuracy by {group}</h3>"
            yield _table(rows, [*head, *map(_text, columns)])
    models = [name for name in columns if name not in record.get("baselines", [])]
    for name in models[-2:]:
        drawn = draw_figures(columns[name])
        if drawn:
            yield f"<h3>{_text(name)}</h3>{_image_row(drawn)}"
    yield from _samples(record.get("questions", []), {name: columns[name] for name in models})


def _by_group(
    columns: Mapping[str, EvaluationScores], group: str, input_determined: Sequence[str]
) -> Iterator[list[str]]:
    for name, figures in next(iter(columns.values())).groups[group].items():
        if "severity_accuracy" not in figures:
            continue
        accuracies = (scores.groups[group].get(name, {}) for scores in columns.values())
        cells = [_percent(accuracy.get("severity_accuracy")) for accuracy in accuracies]
        determined = [] if group == "severity" else ["yes" if name in input_determined else "no"]
        yield [_text(name), str(int(figures["answers"])), *determined, *cells]


def _samples(questions: Sequence[Mapping[str, str]], columns: Mapping[str, EvaluationScores]) -> Iterator[str]:
    if not columns or not questions:
        return
    yield "<h3>Samples</h3>"
    for index, question in enumerate(questions[:SAMPLES]):
        answers = {name: scores.outcomes[index].text for name, scores in columns.items()}
        yield f"<details{' open' if index == 0 else ''}><summary>{_text(question['content'], 120)}</summary>"
        yield f"<p><small>input</small></p><pre>{_text(question['content'])}</pre>"
        yield _table(list(_comparison_rows(question["expected"], answers)), ["key", "expected", *map(_text, answers)])
        yield "</details>"


def _comparison_rows(expected: str, answers: Mapping[str, str]) -> Iterator[list[str]]:
    """Yields a row per key of the answers, with differing values marked, and a last row for answers without JSON."""
    expected_values, answered = parse(expected), {name: parse(text) for name, text in answers.items()}
    if expected_values is None:  # plain text or an array
        yield ["answer", f"<pre>{_text(expected)}</pre>", *(f"<pre>{_text(text)}</pre>" for text in answers.values())]
        return
    for key in dict.fromkeys([*expected_values, *(key for answer in answered.values() for key in answer or {})]):
        cells = [_text(key), f"<pre>{_value(expected_values, key)}</pre>"]
        for answer in answered.values():
            same = answer is not None and answer.get(key) == expected_values.get(key)
            text = "" if answer is None else _value(answer, key)
            cells.append(f'<pre class="{"ok" if same else "off"}">{text}</pre>')
        yield cells
    if any(answer is None for answer in answered.values()):
        raw = [f"<pre>{_text(text)}</pre>" if answered[name] is None else "" for name, text in answers.items()]
        yield ["not JSON", "", *raw]


def _value(answer: Mapping[str, Any], key: str) -> str:
    return _text(json.dumps(answer[key], ensure_ascii=False)) if key in answer else "<small>missing</small>"


def _cell(scores: EvaluationScores, name: str, form: str) -> str:
    value, _, interval = format_cell(scores, name, form).partition("\n")
    return f"{_text(value)}<br><small>{_text(interval)}</small>" if interval else _text(value)


def _heading(name: str, about: Mapping[str, Any]) -> str:
    if name == "untuned" or "step" not in about:
        return _text(name)
    return f"{_text(name)}<br><small>{_text(weights_label(about))}</small>"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.0%}"


def _image_row(figures: Mapping[str, Figure]) -> str:
    images = []
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        images.append(f'<img alt="{_text(name)}" src="data:image/png;base64,{data}">')
    return f'<div class="row">{"".join(images)}</div>'


def _table(rows: Sequence[Sequence[str]], headings: Sequence[str] = ()) -> str:
    """Returns a table of cells that are already HTML."""
    head = f"<tr>{''.join(f'<th>{cell}</th>' for cell in headings)}</tr>" if headings else ""
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{head}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(value: Any, width: int = WIDTH) -> str:
    return html(value, width)


def _config(text: str) -> str:
    """Returns the text of a config without secrets; a run of an older version may have some."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return redact_text(text)
    clean = redact(content)
    return redact_text(text if clean == content else yaml.safe_dump(clean, sort_keys=False))


def _run_name(run: Path) -> str:
    return "/".join(run.resolve().parts[-2:])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
