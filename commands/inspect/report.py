"""Prints the report of ``inspect`` as text: tables, and one example in colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from datamodules.output_text import console_text, printable

if TYPE_CHECKING:
    from datamodules.tokenization.chat_format import Example

STYLES = {"prefix": "dim cyan", "prompt": "dim", "completion": "bold green"}
SHOWN = 1500  #: largest number of characters of each part of the example
JOIN = 4  #: number of tokens that are printed on each side of a join of two parts


@dataclass(frozen=True)
class Sample:
    """An example as text.

    Attributes:
        task: name of the task.
        lengths: number of tokens of ``prefix``, ``prompt`` (after the prefix) and ``completion``.
        texts: text of the same parts, with control tokens.
        joins: (id, token) pairs around each join of two parts, by the name of the join.
    """

    task: str
    lengths: dict[str, int]
    texts: dict[str, str]
    joins: dict[str, list[tuple[int, str]]]

    @classmethod
    def of(cls, example: Example, tokenizer: Any) -> Sample:
        """Decodes an example.

        Args:
            example: the example.
            tokenizer: tokenizer of Hugging Face.
        """
        prefix = example.prefix_length
        prompt, completion = example.prompt_ids.tolist(), example.completion_ids.tolist()
        parts = {"prefix": prompt[:prefix], "prompt": prompt[prefix:], "completion": completion}
        ends = {
            "start": prompt[: 2 * JOIN],
            "prefix | prompt": prompt[max(prefix - JOIN, 0) : prefix + JOIN],
            "prompt | completion": prompt[-JOIN:] + completion[:JOIN],
            "end": completion[-JOIN:],
        }
        return cls(
            task=example.task,
            lengths={part: len(ids) for part, ids in parts.items()},
            texts={part: tokenizer.decode(ids, skip_special_tokens=False) for part, ids in parts.items()},
            joins={
                join: list(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)) for join, ids in ends.items()
            },
        )

    def summary(self) -> dict[str, Any]:
        """Returns the part of the JSON report about the example, without its text."""
        return {"task": self.task, "lengths": self.lengths, "joins": self.joins}

    def render(self) -> Group:
        """Returns the example in colour, and the ids at its joins."""
        text = Text()
        for part, style in STYLES.items():
            text.append(printable(_shorten(self.texts[part]), newlines=True), style)
        legend = Text("mask: ")
        for part, style in STYLES.items():
            label = "labels" if part == "completion" else part
            legend.append(f"{label} {self.lengths[part]} tokens", style).append("  ")
        joins = Table(box=None, show_header=False, padding=(0, 1))
        for join, ids in self.joins.items():
            joins.add_row(join, Text("  ".join(f"{number} {printable(token)!r}" for number, token in ids)))
        return Group(legend, text, Text(), joins)


def _shorten(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]} [... {len(text) - SHOWN} characters ...] {text[-SHOWN // 2 :]}"


def print_report(report: dict[str, Any], sample: Sample | None, console: Console | None = None) -> None:
    """Prints a report.

    Args:
        report: result of :func:`commands.inspect.command.inspect_run`.
        sample: the example to print; None for none.
        console: console to print to; None for stdout.
    """
    console = console or Console(highlight=False)
    for title, body in _sections(report):
        console.print(Text(f"\n{title}", "bold"))
        console.print(body)
    if sample:
        console.print(Text(f"\nOne example of task {sample.task}", "bold"))
        console.print(sample.render())
    for warning in report["warnings"]:
        console.print(console_text(f"\nWARNING: {warning}", newlines=True, style="bold yellow"))
    console.print(Text(f"\nread in {report['seconds']} s", "dim"))


def _sections(report: dict[str, Any]) -> list[tuple[str, Any]]:
    packing = report["packing"]
    return [
        ("Records", _records(report)),
        ("Examples (distinct, all splits)", _examples(report)),
        ("Tokens per example", _lengths(report)),
        (f"Packing of the training epoch in rows of {packing['sequence_length']:,} tokens", _packing(packing)),
        ("Run", _run(report)),
    ]


def _lines(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name, value in rows:
        table.add_row(Text(name), console_text(value, newlines=True))
    return table


def _grid(header: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", header_style="dim", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(console_text(cell) for cell in row))
    return table


def _total_with_reasons(total: int, reasons: dict[str, int]) -> str:
    listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
    return f"{total:,}" + (f"  ({listed})" if listed else "")


def _records(report: dict[str, Any]) -> Table:
    records, near = report["records"], report["near_duplicates"]
    whole = "" if records["complete"] else "  (a part: --limit)"
    too_long = {task: count for task, count in report["overflow"].items() if count}
    rows = [
        ("sources", ", ".join(report["sources"]) + whole),
        ("documents", f"{records['documents']:,}"),
        ("findings", f"{records['findings']:,}"),
        ("with a rationale", f"{records['rationales']:,} findings; risk_rationale: true trains them"),
        ("correlations", f"{records['correlations']:,}"),
        ("repaired", _total_with_reasons(report["repaired"], report["repairs"])),
        ("quarantined", _total_with_reasons(report["quarantined"], report["quarantine"])),
        ("without an example", _total_with_reasons(sum(records["skipped"].values()), records["skipped"])),
        ("duplicates", f"{report['duplicates']:,} examples (input and answer)"),
        ("conflicts", f"{report['conflicts']:,} examples (same input, another answer), {report['merged']:,} merged"),
        ("too long", _total_with_reasons(sum(too_long.values()), too_long)),
        ("without a label", f"{report['unsupervised_examples']:,}"),
    ]
    if near:
        leaked = ", ".join(f"{count:,} of {split}" for split, count in near["leaked"].items())
        rows.append(
            (
                "near duplicates",
                f"{near['near']:,} of {near['looked_at']:,} distinct findings (Jaccard index {near['threshold']} or "
                f"more); near to a training finding: {leaked}"
                + ("" if near["complete"] else "; the rest not compared"),
            )
        )
    return _lines(rows)


def _examples(report: dict[str, Any]) -> Group:
    splits = [
        [split, *(f"{counts[name]:,}" for name in ("findings", "correlations", "examples"))]
        for split, counts in report["splits"].items()
    ]
    tasks = [
        [task, f"{count:,}", *(_shares(report[name].get(task, {}), count) for name in ("severities", "categories"))]
        for task, count in report["examples"].items()
    ]
    by_task = _grid(["task", "examples", "severity", "category"], tasks)
    for column in by_task.columns[2:]:
        column.justify = "left"
    return Group(_grid(["split", "findings", "correlations", "examples"], splits), Text(), by_task)


def _shares(counts: dict[str, int], total: int) -> str:
    return ", ".join(f"{name} {count / max(total, 1):.1%}" for name, count in counts.items())


def _lengths(report: dict[str, Any]) -> Table:
    rows = [
        [task if part == "prompt" else "", part, *(f"{value:,}" for value in values.values())]
        for task, parts in report["lengths"].items()
        for part, values in parts.items()
    ]
    header = list(next(iter(report["lengths"].values()))["total"]) if report["lengths"] else []
    return _grid(["task", "", *header], rows)


def _packing(packing: dict[str, Any]) -> Table:
    rows = [
        [
            f"{mode}{' *' if mode == packing['mode'] else ''}", f"{sums['rows']:,}", f"{sums['efficiency']:.2%}",
            f"{sums['padding']:.2%}", f"{sums['supervised']:.1%}",
            f"{sums['prefix_saved']:,} ({sums['prefix_saved_share']:.1%})",
        ]
        for mode, sums in packing["modes"].items()
    ]  # fmt: skip
    return _grid(["mode (* configured)", "rows", "filled", "padding", "supervised", "prefix tokens saved"], rows)


def _run(report: dict[str, Any]) -> Table:
    epoch = report["epoch"]
    max_steps = f" (max_steps {epoch['max_steps']:,})" if epoch["max_steps"] else ""
    sizes = f"{epoch['batch_size']} rows x {epoch['accumulate']} micro-batches x {epoch['devices']} devices"
    return _lines(
        [
            ("epoch", f"{epoch['examples']:,} examples in {epoch['rows']:,} rows"),
            ("steps", f"{epoch['steps']:,} per epoch{max_steps}: {sizes}"),
            *_memory(report),
            *_teacher_cache(report["teacher_cache"]),
            *_time(report),
        ]
    )


def _memory(report: dict[str, Any]) -> list[tuple[str, str]]:
    memory = report["memory"]
    if not memory:
        return [("peak memory", f"no estimate: {report['no_estimate']}")]
    parts = ", ".join(f"{part} {value:.2f}" for part, value in memory["parts_gib"].items())
    highest = max(memory["moments_gib"], key=memory["moments_gib"].__getitem__)
    settings = f"{memory['kernels']} kernels, activation_checkpointing {memory['activation_checkpointing']}"
    return [
        ("peak memory", f"{memory['peak_gib']:.2f} GiB per device, at the {highest} ({memory['basis']})"),
        ("memory by part", f"{parts} GiB, each at its maximum; {settings}"),
    ]


def _teacher_cache(cache: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not cache:
        return []
    folder = f" in {cache['dir']}" if cache["dir"] else ", if objective.cache.dir is set"
    token = f"{cache['bytes_token']} per supervised token"
    sizes = f"{cache['bytes_finding']:,.0f} bytes per finding (top_k {cache['top_k']}, {token})"
    return [("cached teacher", f"{sizes}, {cache['epoch_gib']:,.2f} GiB per epoch{folder}")]


def _time(report: dict[str, Any]) -> list[tuple[str, str]]:
    device = report["device"]
    if device:
        run = f", {_hours(device['hours_run'])} for the run" if device["hours_run"] else ""
        return [(f"time on {device['name']}", f"{_hours(device['hours_epoch'])} per epoch{run} ({device['basis']})")]
    return [("time", "give a device: --device h100")] if report["memory"] else []


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
