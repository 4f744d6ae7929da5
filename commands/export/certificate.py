"""The certificate of an export: what it was made of, and how far its answers lie from the trained model's."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.run_record import REPOSITORY, git_state, package_versions
from commands.model_source import CERTIFICATE, recipe

if TYPE_CHECKING:
    from commands.model_source import Trained
    from datamodules.tasks.base import Pair

JUDGED = ("schema_valid", "severity_accuracy")  #: shares that an export may not lower much
OF_THE_RUN = ("step", "state", "started", "ended", "git", "packages", "data", "devices")  #: kept of run.json


@dataclass(frozen=True)
class Bounds:
    """How far an export may lie from the trained model.

    Attributes:
        max_kl: greatest mean divergence, in nats a token.
        max_drop: how much smaller the share of valid answers, or of right severities, may be.
    """

    max_kl: float
    max_drop: float

    def exceeded(self, measured: dict[str, Any]) -> list[str]:
        """What is beyond a bound, and by how much; empty where the export passes."""
        kl, words = measured["kl_mean"], []
        if kl is None:
            words.append("divergence is not a number")
        elif kl > self.max_kl:
            words.append(f"divergence {kl:.3g} nats a token is {kl - self.max_kl:.3g} above --max_kl {self.max_kl:g}")
        for name in JUDGED:
            if name not in measured["trained"]:
                continue
            before, after = measured["trained"][name], measured["exported"].get(name, 0.0)
            if (drop := before - after) > self.max_drop + 1e-9:
                by = drop - self.max_drop
                words.append(
                    f"{name} fell from {before:.3g} to {after:.3g}, {by:.3g} more than --max_drop {self.max_drop:g}"
                )
        return words


def facts(trained: Trained, settings: dict[str, Any]) -> dict[str, Any]:
    """What is known before anything is written: of the run, and of this machine's export.

    Args:
        trained: of a run folder.
        settings: what the export is; entries that are None are left out.
    """
    assert trained.run is not None
    run = _run_record(trained.run)
    return {
        **{name: value for name, value in settings.items() if value is not None},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": recipe(trained.backbone),
        "tasks": list(trained.tasks or ()),
        "run": {name: run[name] for name in OF_THE_RUN if name in run},
        "config": _nameless(trained.config),
        "config_sha256": sha256(trained.run / "config.yaml"),
        "weights_digest": trained.digest(),
        "git": git_state(REPOSITORY),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def verdict(measured: dict[str, Any], reference: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    """The measured part: state, what failed, the bounds and the figures.

    Args:
        measured: of :func:`lightning_modules.evaluation.model_comparison.compare`; empty where nothing was measured.
        reference: where the questions are from.
        bounds: what is allowed.
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
    """The measured part for the console."""
    reference = certificate["reference"]
    if certificate["state"] == "not measured":
        return ["  certificate  not measured (--num_reference 0)"]
    kl = "not a number" if reference["kl_mean"] is None else f"{reference['kl_mean']:.2g} nats a token"
    word = "passed" if certificate["state"] == "passed" else "FAILED"
    lines = [
        f"  certificate  {word}: divergence {kl} (at most {reference['max_kl']:g}), "
        f"{reference['same_answers']:.0%} of {reference['n']} answers the same",
        *(f"  FAILED       {words}" for words in certificate["failures"]),
    ]
    for name, value in reference["trained"].items():
        lines.append(f"  {name:<17} trained {value:.3g}, exported {reference['exported'].get(name, float('nan')):.3g}")
    return lines


def save(target: Path, certificate: dict[str, Any]) -> None:
    """Writes the certificate; a reader sees the old or the new one, never half of it."""
    unfinished = target / f"{CERTIFICATE}.unfinished"
    unfinished.write_text(json.dumps(certificate, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(target / CERTIFICATE)


def files(target: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of an export but the certificate."""
    found = sorted(path for path in target.iterdir() if path.is_file() and path.name != CERTIFICATE)
    return {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in found}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(pairs: list[Pair]) -> str:
    """Digest of questions and expected answers: two certificates of the same one can be compared."""
    return hashlib.sha256(json.dumps([[pair.content, pair.completion] for pair in pairs]).encode()).hexdigest()


def _run_record(run: Path) -> dict[str, Any]:
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _nameless(value: Any) -> Any:
    """A config without the folders of the machine that it ran on: of an absolute path only the name."""
    if isinstance(value, dict):
        return {key: _nameless(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nameless(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
