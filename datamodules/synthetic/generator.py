"""Generates findings in the archive's real wire format, at any scale: same seed, same bytes.

How each target is made, in short (:mod:`datamodules.synthetic.labeling_rules` has the formulas and the noiseless
answer, :func:`truth`):

- A finding's grounds are drawn: its evidence (expected, unusual, tampered, known-bad), whether it runs or is owned as
  root, whether it is open to anyone (0.0.0.0, /tmp, a public address), whether something mitigates it. The description
  says the evidence in words, the metadata say the rest in values, the title says nothing of it.
- Severity, tags, baseline status and rationale follow from these without noise. ``risk_score`` has uniform noise of
  3 points, each subscore and ``probability_actionable`` of 0.02; a noisy risk score stays in its severity's band.
- Severities have fixed shares (info 50 %, low 15, medium 18, high 12, critical 5), the same in every category.
- Correlations follow from findings that share a PID or a path, risk one severity above the worst of them, no noise.
- Summaries, reductions and actions of ``ground_truth_v1`` are counted and ranked from the findings' answers.
- 1 % of the findings hold text aimed at a language model in a command line; their answers follow the same rules.
- ``duplicates`` and ``conflicts`` (default 0) replace that share of the findings by copies of others of their shard,
  conflicts with the severity moved to a neighbour and the risk score by 20 points.

The bytes are the same for the same arguments and versions of this generator, orjson and isal; the documents inside
depend on the generator's version only. One shard is in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import orjson
from isal import igzip, igzip_lib

from datamodules.errors import UserError
from datamodules.records import SEVERITIES
from datamodules.synthetic.documents import batch_document, ground_truth_document, write_correlations
from datamodules.synthetic.finding_text import write_findings
from datamodules.synthetic.labeling_rules import SEVERITY_STEP, correlate, truth
from datamodules.synthetic.sampling import Stream, draw_rows

__all__ = ["GENERATOR_VERSION", "SynthesisReport", "correlate", "iter_documents", "synthesize", "truth"]

GENERATOR_VERSION = 2  #: raise it when the documents of a seed change
Layout = Literal["batch", "ground_truth"]
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz")
_FOLDER = "massive_datasets"
REPORT_NAME = "generation_report.json"
_START = datetime(2025, 9, 19, 8, 11, 19, tzinfo=UTC)
_GZIP_LEVEL = 1  # hex of gzip hardly compresses better at any level


@dataclass
class SynthesisReport:
    """What :func:`synthesize` wrote; ``bytes`` on disk, ``seconds`` of wall time."""

    output: Path
    findings: int = 0
    correlations: int = 0
    shards: int = 0
    bytes: int = 0
    seconds: float = 0.0
    batches: list[dict[str, Any]] = field(default_factory=list, repr=False)


def iter_documents(
    findings: int,
    seed: int,
    *,
    layout: Layout = "batch",
    findings_per_shard: int = 5000,
    duplicates: float = 0.0,
    conflicts: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Yields the documents, one a shard, as plain objects.

    Args:
        findings: how many in all; the last shard has the rest.
        seed: 0 or more.
        layout: ``batch``, or ``ground_truth`` for ``ground_truth_v1``.
        findings_per_shard: at most so many in one document.
        duplicates: share of findings that copy another one's input and answer.
        conflicts: share of findings that copy another one's input and answer otherwise.

    Raises:
        UserError: an argument is out of its range.
    """
    check_arguments(findings, seed, layout, findings_per_shard, duplicates, conflicts)
    for shard in range(-(-findings // findings_per_shard)):
        count = min(findings_per_shard, findings - shard * findings_per_shard)
        with _no_collection():
            document = _document(count, seed, shard, layout, duplicates, conflicts)
        yield document


def check_arguments(
    findings: int, seed: int, layout: str, per_shard: int, duplicates: float = 0.0, conflicts: float = 0.0
) -> None:
    """Raises UserError where an argument of :func:`synthesize` is out of its range."""
    if findings < 1:
        raise UserError(f"--findings is {findings}: ask for 1 or more")
    if per_shard < 1:
        raise UserError(f"--findings_per_shard is {per_shard}: ask for 1 or more")
    if seed < 0:
        raise UserError(f"--seed is {seed}: use 0 or a positive number")
    if layout not in ("batch", "ground_truth"):
        raise UserError(f"--layout is {layout!r}: use batch or ground_truth")
    if min(duplicates, conflicts) < 0 or duplicates + conflicts > 0.5:
        raise UserError(f"duplicates {duplicates} and conflicts {conflicts}: use shares from 0 that sum to at most 0.5")


def _document(count: int, seed: int, shard: int, layout: Layout, duplicates: float, conflicts: float) -> dict[str, Any]:
    stream = Stream(GENERATOR_VERSION, seed, shard)
    stamp = f"{_time(shard):%Y-%m-%dT%H:%M:%S.%f}"
    whole = layout == "ground_truth"
    findings = list(write_findings(draw_rows(stream, count), shard, processed_at=stamp, whole_numbers=whole))
    correlations = write_correlations(findings, correlate(findings), stamp=stamp, whole_numbers=whole)
    _copy_some(findings, stream, duplicates, conflicts)
    dataset_id = hashlib.blake2b(f"{GENERATOR_VERSION} {seed} {shard}".encode(), digest_size=8).hexdigest()
    build = ground_truth_document if whole else batch_document
    return build(findings, correlations, dataset_id=dataset_id, stamp=stamp)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pauses the cycle collector: a shard is a hundred thousand new objects without a cycle (a fifth of the time)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _time(shard: int) -> datetime:
    return _START + timedelta(seconds=2 * shard)


def _copy_some(findings: list[dict[str, Any]], stream: Stream, duplicates: float, conflicts: float) -> None:
    """Replaces findings by copies of others (in place); those in a correlation neither give nor take."""
    if not duplicates and not conflicts:
        return
    free = [i for i in stream.permutation(len(findings)).tolist() if not findings[i]["correlation_refs"]]
    equal, other = round(duplicates * len(findings)), round(conflicts * len(findings))
    half = len(free) // 2
    for number, (target, source) in enumerate(zip(free[:half][: equal + other], free[half:], strict=False)):
        copy = findings[source] | {"id": findings[target]["id"], "correlation_refs": []}
        findings[target] = copy if number < equal else _contradict(copy)


def _contradict(finding: dict[str, Any]) -> dict[str, Any]:
    level = SEVERITIES.index(finding["severity"])
    step = 1 if level < 4 else -1
    score = finding["risk_score"] + step * SEVERITY_STEP
    return finding | {"severity": SEVERITIES[level + step], "risk_score": score, "risk_total": int(score)}


def synthesize(
    output: Path,
    *,
    findings: int,
    seed: int,
    envelope: bool = True,
    layout: Layout = "batch",
    findings_per_shard: int = 5000,
    duplicates: float = 0.0,
    conflicts: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> SynthesisReport:
    """Writes shards and one generation report to a folder, or to an archive where output ends in .tar.gz or .tgz.

    An archive comes to its name only when it is complete; files of the same names in a folder are replaced.

    Args:
        output: folder or archive.
        findings: as for :func:`iter_documents`, as are seed, layout, findings_per_shard, duplicates and conflicts.
        seed: see there.
        envelope: wrap each document as the archive does (hex of gzip of JSON), or write it plain.
        layout: see there.
        findings_per_shard: see there.
        duplicates: see there.
        conflicts: see there.
        progress: called after each shard with the number of findings written so far.

    Raises:
        UserError: an argument is out of its range.
    """
    check_arguments(findings, seed, layout, findings_per_shard, duplicates, conflicts)
    started = time.perf_counter()
    documents = iter_documents(
        findings, seed, layout=layout, findings_per_shard=findings_per_shard, duplicates=duplicates, conflicts=conflicts
    )
    report = SynthesisReport(Path(output))
    members = _members(documents, report, seed, envelope, progress)
    if report.output.name.endswith(ARCHIVE_SUFFIXES):
        _write_archive(report.output, members)
        report.bytes = report.output.stat().st_size
    else:
        report.output.mkdir(parents=True, exist_ok=True)
        for name, content in members:
            report.bytes += (report.output / name).write_bytes(content)
    report.seconds = time.perf_counter() - started
    return report


def _members(
    documents: Iterator[dict[str, Any]],
    report: SynthesisReport,
    seed: int,
    envelope: bool,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[str, bytes]]:
    """File names and contents, the generation report last; counts into ``report``."""
    for document in documents:
        name = f"batch_{report.shards + 1:03d}_{_time(report.shards):%Y%m%d_%H%M%S}.json"
        content = orjson.dumps(document)
        body = document.get("data") or document
        found = len(body.get("enriched_findings", ())) or body["statistics"]["total_findings"]
        report.shards += 1
        report.findings += found
        report.correlations += len(body["correlations"])
        report.batches.append({"file": name, "findings": found, "correlations": len(body["correlations"])})
        yield name, _envelope(content) if envelope else content
        if progress:
            progress(report.findings)
    yield REPORT_NAME, orjson.dumps(_generation_report(report, seed), option=orjson.OPT_INDENT_2)


def _envelope(content: bytes) -> bytes:
    packed = igzip_lib.compress(content, _GZIP_LEVEL, igzip_lib.COMP_GZIP)  # writes modification time 0
    head = (
        '{"compressed":true,"compression_method":"gzip",'
        f'"original_size":{len(content)},"compressed_size":{len(packed)},"data":"'
    )
    return b"".join((head.encode(), packed.hex().encode(), b'"}'))


def _generation_report(report: SynthesisReport, seed: int) -> dict[str, Any]:
    return {
        "generation_stats": {
            "generator_version": GENERATOR_VERSION,
            "seed": seed,
            "batches_completed": report.shards,
            "total_findings": report.findings,
            "total_correlations": report.correlations,
            "errors": [],
        },
        "batch_results": report.batches,
        "output_directory": _FOLDER,
    }


def _write_archive(output: Path, members: Iterator[tuple[str, bytes]]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    try:
        with (
            partial.open("wb") as file,
            # No name and no time in the header, so that the bytes depend on the content alone.
            igzip.IGzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
        ):
            archive.addfile(_entry(_FOLDER, 0, directory=True))
            for name, content in members:
                archive.addfile(_entry(f"{_FOLDER}/{name}", len(content)), io.BytesIO(content))
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _entry(name: str, size: int, directory: bool = False) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, int(_START.timestamp()), 0o755 if directory else 0o644
    entry.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    return entry
