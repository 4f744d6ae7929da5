"""Opens the folder of ``--model`` or ``--run``: a run folder, an export, or a plain adapter or model folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from commands.config_merge import load_config
from datamodules.errors import UserError
from lightning_modules.models.backbone import Backbone, LoRA

CERTIFICATE = "certificate.json"
ADAPTER, MODEL = "adapter_config.json", "config.json"  #: the files by which the kind of a folder is recognised


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on disk, which is not loaded.

    Attributes:
        folder: folder of the adapter or of the whole model.
        backbone: builds the model: base, storage format, and the adapter if there is one.
        tokenizer: folder or name of the tokenizer.
        tasks: tasks that the model was trained on; None if they are not recorded.
        run: run folder; None for an export.
        config: the run's config; empty for an export.
        rationale: whether the model was trained to state a rationale in answers of the risk task.
    """

    folder: Path
    backbone: Backbone
    tokenizer: str
    tasks: tuple[str, ...] | None
    run: Path | None
    config: dict[str, Any]
    rationale: bool = False

    @property
    def name(self) -> str:
        """Name of the base, and whether there is an adapter; of a folder only the last part of the path."""
        base = (
            Path(self.backbone.model_name_or_path).name
            if Path(self.backbone.model_name_or_path).is_dir()
            else self.backbone.model_name_or_path
        )
        return f"{base} with an adapter" if self.backbone.adapter else base

    def digest(self) -> str:
        """Returns a digest of the base and of the files of weights.

        An adapter's files are hashed by content, those of a whole model by size and time of modification, because it
        has gigabytes.
        """
        state = hashlib.blake2b(json.dumps(base_settings(self.backbone), sort_keys=True).encode(), digest_size=16)
        for file in sorted(self.folder.glob("*.safetensors")):
            stat = file.stat()
            state.update(file.read_bytes() if self.backbone.adapter else f"{stat.st_size} {stat.st_mtime_ns}".encode())
        return state.hexdigest()


def open_trained_model(path: str, option: str) -> TrainedModel:
    """Returns the trained model in a folder.

    Args:
        path: a run folder (config.yaml and adapter/best or adapter/last), a folder written by ``export``, or a PEFT
            adapter's or model's folder.
        option: name of the option, for error messages.

    Raises:
        UserError: the folder does not exist or has no model.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{option} {path}: no such folder. Fix: give a run folder (runs/NAME/version_N) or an export.")
    if (folder / "config.yaml").is_file():
        return _open_run(folder, option)
    if (folder / ADAPTER).is_file():
        return _open_adapter(folder, option)
    if (folder / MODEL).is_file():
        record = _certificate(folder)
        backbone = Backbone(model_name_or_path=str(folder))
        return TrainedModel(
            folder, backbone, str(folder), _tasks(record.get("tasks")), None, {}, _rationale(record.get("config"))
        )
    if any(folder.glob("*.gguf")):
        raise UserError(
            f"{option} {path}: a GGUF export is for llama.cpp and Ollama. Fix: give the run folder, or an export with "
            "--format merged."
        )
    raise UserError(
        f"{option} {path}: neither a run folder (config.yaml), an adapter ({ADAPTER}) nor a model ({MODEL}). Fix: give "
        "a run folder that fit wrote (runs/NAME/version_N)."
    )


def base_settings(backbone: Backbone) -> dict[str, Any]:
    """Returns the settings of the base that an adapter was trained on, as plain data."""
    names = ("model_name_or_path", "revision", "quantization", "dtype")
    return {name: getattr(backbone, name) for name in names}


def _open_run(run: Path, option: str) -> TrainedModel:
    config = load_config(str(run / "config.yaml"))
    backbone = _backbone(config, run, option)
    folders = [run / "adapter" / name for name in ("best", "last")]
    folder = next((f for f in folders if (f / ADAPTER).is_file() or (f / MODEL).is_file()), None)
    if folder is None:
        raise UserError(
            f"{option} {run}: no adapter/best or adapter/last. Fix: wait for the first one, or continue with fit."
        )
    whole = not (folder / ADAPTER).is_file()
    backbone = replace(
        backbone,
        model_name_or_path=str(folder) if whole else backbone.model_name_or_path,
        adapter=None if whole else str(folder),
        lora=None,
        attn_implementation="sdpa",
        activation_checkpointing="none",
    )
    tokenizer = str(folder) if (folder / "tokenizer.json").is_file() else backbone.model_name_or_path
    tasks = config.get("data", {}).get("init_args", {}).get("task_weights") or {"risk": 1.0}
    names = _tasks([n for n, s in tasks.items() if s])
    return TrainedModel(folder, backbone, tokenizer, names, run, config, _rationale(config))


def _rationale(config: Any) -> bool:
    """Returns ``data.risk_rationale`` of a config, or of the config in a certificate."""
    data = config.get("data") if isinstance(config, dict) else None
    return isinstance(data, dict) and bool((data.get("init_args") or {}).get("risk_rationale"))


def _open_adapter(folder: Path, option: str) -> TrainedModel:
    record = _certificate(folder)
    base = record.get("base")
    if not isinstance(base, dict):
        try:
            name = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{option} {folder}: {ADAPTER} has no base model. Fix: export it again.") from error
        base = {"model_name_or_path": name}
    known = {field.name for field in fields(Backbone)}
    backbone = Backbone(**{k: v for k, v in base.items() if k in known}, adapter=str(folder))
    tokenizer = str(folder) if (folder / "tokenizer.json").is_file() else backbone.model_name_or_path
    return TrainedModel(
        folder, backbone, tokenizer, _tasks(record.get("tasks")), None, {}, _rationale(record.get("config"))
    )


def _backbone(config: dict[str, Any], run: Path, option: str) -> Backbone:
    try:
        values = dict(config["model"]["init_args"]["backbone"])
        lora = values.pop("lora", None)
        return Backbone(**values, lora=None if lora is None else LoRA(**lora))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{option} {run}: config.yaml has no valid model.init_args.backbone ({error}). Fix: give another run."
        ) from error


def _certificate(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _tasks(names: Any) -> tuple[str, ...] | None:
    return tuple(map(str, names)) if isinstance(names, list) else None


def lora_settings(trained: TrainedModel) -> dict[str, Any]:
    """Returns the run's LoRA settings; empty if every weight was trained."""
    lora = trained.config.get("model", {}).get("init_args", {}).get("backbone", {}).get("lora")
    return asdict(LoRA(**lora)) if lora else {}
