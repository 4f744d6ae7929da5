"""Generates labeled findings in the wire format of the archive, at any scale; the same seed gives the same bytes.

The labels, in short (:mod:`datamodules.synthetic.labeling_rules` has the formulas, and :func:`ground_truth_labels`
computes the noiseless labels):

- The features of a finding are sampled: its evidence (expected, unusual, tampered, known-bad), whether it runs as or is
  owned by root, whether it is open to anyone (0.0.0.0, /tmp, a public address), whether something mitigates it. The
  description expresses the evidence in words and the metadata express the rest as values; the title contains none.
- Severity, tags, baseline status and rationale follow from the features without noise. ``risk_score`` has uniform noise
  of 3 points, each subscore and ``probability_actionable`` of 0.02. A noisy risk score stays in the range of its
  severity.
- Severities have fixed shares (info 50 %, low 15, medium 18, high 12, critical 5), the same in every category.
- Correlations are derived from findings that share a PID or a path. Their risk is one severity above their highest one,
  without noise.
- Summaries, reductions and actions of ``ground_truth_v1`` are counts and rankings of the findings' labels.
- 1 % of the findings have text for a language model in a command line (prompt injection); the same rules label them.
- ``duplicates`` and ``conflicts`` (default 0) replace this share of the findings by copies of other findings of their
  shard. A conflict has the next severity, and a risk score that differs by 20 points.

The bytes are the same for the same arguments and the same versions of this generator, orjson and isal; the documents
depend on the version of the generator only. One shard is in memory at a time.
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
from datamodules.files import atomic_writer
from datamodules.records import SEVERITIES
from datamodules.synthetic.documents import batch_document, ground_truth_document, write_correlations
from datamodules.synthetic.finding_text import write_findings
from datamodules.synthetic.labeling_rules import SEVERITY_STEP, correlate, ground_truth_labels
from datamodules.synthetic.sampling import RandomStream, sample_findings

__all__ = ["GENERATOR_VERSION", "SynthesisReport", "correlate", "ground_truth_labels", "iter_documents", "synthesize"]

GENERATOR_VERSION = 2  #: to be increased when the documents of a seed change
Layout = Literal["batch", "ground_truth"]
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz")
_FOLDER = "massive_datasets"
REPORT_NAME = "generation_report.json"
_START = datetime(2025, 9, 19, 8, 11, 19, tzinfo=UTC)
_GZIP_LEVEL = 1  # the archive contains hex of gzip, which higher levels hardly compress further


@dataclass
class SynthesisReport:
    """Counts of the output of :func:`synthesize`; ``bytes`` on disk, ``seconds`` of wall time."""

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
    """Yields the documents, one per shard, as JSON-compatible objects.

    Args:
        findings: total number of findings; the last shard has the remainder.
        seed: 0 or larger.
        layout: ``batch``, or ``ground_truth`` for ``ground_truth_v1``.
        findings_per_shard: largest number of findings in one document.
        duplicates: share of findings that copy the input and the labels of another one.
        conflicts: share of findings that copy the input of another one and have other labels.

    Raises:
        UserError: an argument is out of its range.
    """
    check_arguments(findings, seed, layout, findings_per_shard, duplicates, conflicts)
    for shard in range(-(-findings // findings_per_shard)):
        count = min(findings_per_shard, findings - shard * findings_per_shard)
        with _garbage_collection_paused():
            document = _document(count, seed, shard, layout, duplicates, conflicts)
        yield document


def check_arguments(
    findings: int, seed: int, layout: str, per_shard: int, duplicates: float = 0.0, conflicts: float = 0.0
) -> None:
    """Raises UserError if an argument of :func:`synthesize` is out of its range."""
    if findings < 1:
        raise UserError(f"--findings={findings}: must be at least 1")
    if per_shard < 1:
        raise UserError(f"--findings_per_shard={per_shard}: must be at least 1")
    if seed < 0:
        raise UserError(f"--seed={seed}: must be at least 0")
    if layout not in ("batch", "ground_truth"):
        raise UserError(f"--layout={layout}: must be batch or ground_truth")
    if min(duplicates, conflicts) < 0 or duplicates + conflicts > 0.5:
        raise UserError(
            f"duplicates={duplicates}, conflicts={conflicts}: must be at least 0 each and at most 0.5 together"
        )


def _document(count: int, seed: int, shard: int, layout: Layout, duplicates: float, conflicts: float) -> dict[str, Any]:
    stream = RandomStream(GENERATOR_VERSION, seed, shard)
    stamp = f"{_time(shard):%Y-%m-%dT%H:%M:%S.%f}"
    whole = layout == "ground_truth"
    findings = list(write_findings(sample_findings(stream, count), shard, processed_at=stamp, whole_numbers=whole))
    correlations = write_correlations(findings, correlate(findings), stamp=stamp, whole_numbers=whole)
    _add_duplicates(findings, stream, duplicates, conflicts)
    dataset_id = hashlib.blake2b(f"{GENERATOR_VERSION} {seed} {shard}".encode(), digest_size=8).hexdigest()
    build = ground_truth_document if whole else batch_document
    return build(findings, correlations, dataset_id=dataset_id, stamp=stamp)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pauses the garbage collector: a shard has 100,000 new objects and no reference cycle (saves 20 % of the time)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _time(shard: int) -> datetime:
    return _START + timedelta(seconds=2 * shard)


def _add_duplicates(findings: list[dict[str, Any]], stream: RandomStream, duplicates: float, conflicts: float) -> None:
    """Replaces findings by copies of other ones, in place; the findings of correlations are excluded."""
    if not duplicates and not conflicts:
        return
    free = [i for i in stream.permutation(len(findings)).tolist() if not findings[i]["correlation_refs"]]
    equal, other = round(duplicates * len(findings)), round(conflicts * len(findings))
    half = len(free) // 2
    for number, (target, source) in enumerate(zip(free[:half][: equal + other], free[half:], strict=False)):
        copy = findings[source] | {"id": findings[target]["id"], "correlation_refs": []}
        findings[target] = copy if number < equal else _with_conflicting_labels(copy)


def _with_conflicting_labels(finding: dict[str, Any]) -> dict[str, Any]:
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
    """Writes shards and one generation report to a folder, or to an archive if output ends in .tar.gz or .tgz.

    An archive gets its name when it is complete. In a folder, files of the same names are replaced.

    Args:
        output: folder or archive.
        findings: see :func:`iter_documents`.
        seed: see :func:`iter_documents`.
        envelope: whether to wrap each document like the archive (hex of gzip of JSON); otherwise it is plain JSON.
        layout: see :func:`iter_documents`.
        findings_per_shard: see :func:`iter_documents`.
        duplicates: see :func:`iter_documents`.
        conflicts: see :func:`iter_documents`.
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
    """Yields file names and contents, the generation report last; adds the counts to ``report``."""
    for document in documents:
        name = f"batch_{report.shards + 1:03d}_{_time(report.shards):%Y%m%d_%H%M%S}.json"
        content = orjson.dumps(document)
        body = document.get("data") or document
        count = len(body.get("enriched_findings", ())) or body["statistics"]["total_findings"]
        report.shards += 1
        report.findings += count
        report.correlations += len(body["correlations"])
        report.batches.append({"file": name, "findings": count, "correlations": len(body["correlations"])})
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
    with (
        atomic_writer(output) as file,
        # no name and no time in the gzip header, so that the bytes depend on the content only
        igzip.IGzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        archive.addfile(_entry(_FOLDER, 0, directory=True))
        for name, content in members:
            archive.addfile(_entry(f"{_FOLDER}/{name}", len(content)), io.BytesIO(content))


def _entry(name: str, size: int, directory: bool = False) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, int(_START.timestamp()), 0o755 if directory else 0o644
    entry.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    return entry
