"""Builds the certificate of an export: its origin, and the difference between its answers and the trained model's."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.run_record import REPOSITORY, git_state, package_versions
from commands.model_source import CERTIFICATE, base_settings
from datamodules.files import atomic_write
from datamodules.redaction import redact

if TYPE_CHECKING:
    from commands.model_source import TrainedModel
    from datamodules.tasks.base import Pair

QUALITY = ("schema_valid", "severity_accuracy")  #: shares whose decrease ``max_drop`` limits
#: entries of run.json that are copied
RUN_ENTRIES = ("step", "state", "started", "ended", "git", "packages", "data", "devices")


@dataclass(frozen=True)
class Bounds:
    """Largest allowed differences between an export and the trained model.

    Attributes:
        max_kl: largest mean Kullback-Leibler divergence, in nats per token.
        max_drop: largest decrease of the share of valid answers, and of the share of correct severities.
    """

    max_kl: float
    max_drop: float

    def exceeded(self, measured: dict[str, Any]) -> list[str]:
        """Returns a text for each bound that is exceeded; empty if the export passes.

        Args:
            measured: result of :func:`lightning_modules.evaluation.model_comparison.compare`.
        """
        kl, failures = measured["kl_mean"], []
        if kl is None:
            failures.append("divergence is not a number")
        elif kl > self.max_kl:
            above = f"{kl - self.max_kl:.3g} above --max_kl {self.max_kl:g}"
            failures.append(f"divergence {kl:.3g} nats per token is {above}")
        for name in QUALITY:
            if name not in measured["trained"]:
                continue
            before, after = measured["trained"][name], measured["exported"].get(name, 0.0)
            if (drop := before - after) > self.max_drop + 1e-9:
                excess = drop - self.max_drop
                failures.append(
                    f"{name} fell from {before:.3g} to {after:.3g}, {excess:.3g} more than --max_drop {self.max_drop:g}"
                )
        return failures


def describe(trained: TrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of the certificate that is known before the export: the run, the code and the settings.

    Args:
        trained: model of a run folder.
        settings: settings of the export; entries that are None are left out.
    """
    assert trained.run is not None
    run = _run_record(trained.run)
    return {
        **{name: value for name, value in settings.items() if value is not None},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": base_settings(trained.backbone),
        "tasks": list(trained.tasks or ()),
        "run": {name: run[name] for name in RUN_ENTRIES if name in run},
        "config": _without_folders(trained.config),
        "config_sha256": sha256(trained.run / "config.yaml"),
        "weights_digest": trained.digest(),
        "git": git_state(REPOSITORY),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def measured_part(measured: dict[str, Any], reference: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    """Returns the measured part of the certificate: state, failures, bounds and figures.

    Args:
        measured: result of :func:`lightning_modules.evaluation.model_comparison.compare`; empty without a measurement.
        reference: task and origin of the reference questions.
        bounds: largest allowed differences.
    """
    if not measured:
        return {"state": "not measured", "reference": {"n": 0, "why": "--num_reference 0"}}
    failures = bounds.exceeded(measured)
    return {
        "state": "failed" if failures else "passed",
        "failures": failures,
        "reference": reference | {"max_kl": bounds.max_kl, "max_drop": bounds.max_drop} | measured,
    }


def format_summary(certificate: dict[str, Any]) -> list[str]:
    """Returns the measured part as lines for the console."""
    reference = certificate["reference"]
    if certificate["state"] == "not measured":
        return ["  certificate  not measured (--num_reference 0)"]
    kl = "not a number" if reference["kl_mean"] is None else f"{reference['kl_mean']:.2g} nats per token"
    state = "passed" if certificate["state"] == "passed" else "FAILED"
    lines = [
        f"  certificate  {state}: divergence {kl} (at most {reference['max_kl']:g}), "
        f"{reference['same_answers']:.0%} of {reference['n']} answers the same",
        *(f"  FAILED       {failure}" for failure in certificate["failures"]),
    ]
    for name, value in reference["trained"].items():
        lines.append(f"  {name:<17} trained {value:.3g}, exported {reference['exported'].get(name, float('nan')):.3g}")
    return lines


def save(target: Path, certificate: dict[str, Any]) -> None:
    """Writes the certificate atomically, without secrets.

    Args:
        target: folder of the export.
        certificate: JSON-ready.
    """
    atomic_write(target / CERTIFICATE, json.dumps(redact(certificate), indent=2, allow_nan=False) + "\n")


def file_entries(target: Path) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 of every file of an export except the certificate."""
    files = sorted(path for path in target.iterdir() if path.is_file() and path.name != CERTIFICATE)
    return {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files}


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pairs_digest(pairs: list[Pair]) -> str:
    """Returns a digest of questions and expected answers: certificates of the same digest are comparable."""
    return hashlib.sha256(json.dumps([[pair.content, pair.completion] for pair in pairs]).encode()).hexdigest()


def _run_record(run: Path) -> dict[str, Any]:
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _without_folders(value: Any) -> Any:
    """Returns a config without the machine's folders: an absolute path becomes its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
