"""``python main.py cache-teacher``: writes the predictions of a frozen teacher, so that ``fit`` needs no teacher.

The examples of the configured run are written once each, in the order of their first use, in shards of
``--shard_examples`` examples. A shard depends only on its own examples: another process, or the same command run again,
writes the same bytes. A command that was stopped therefore continues with the missing shards, and each of N GPUs writes
every N-th shard without communication between the processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from commands import program
from commands.cache_teacher.writer import CacheWriter
from commands.config_only_cli import ConfigOnlyCLI
from commands.options import check_minimum, parse_own_options
from datamodules.errors import UserError

#: environment variables of a process: its number, and the number of processes
RANK, RANKS = "SYS_SCAN_CACHE_RANK", "SYS_SCAN_CACHE_RANKS"
MAIN = Path(__file__).parents[2] / "main.py"  #: the program of the processes


def main(args: list[str]) -> int:
    """Runs ``cache-teacher`` with its options.

    Args:
        args: the command's name and its options.

    Returns:
        The exit status: 0, or the first one of a process that failed.

    Raises:
        UserError: the config has no teacher to cache, or the folder has a cache of another teacher, data or model.
    """
    options, rest = _parse(args)
    if options.devices > 1 and RANK not in os.environ:
        return _run_on_every_device(args, options.devices)
    rank, ranks = int(os.environ.get(RANK, 0)), int(os.environ.get(RANKS, 1))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli = ConfigOnlyCLI(rest, run=False)
    CacheWriter.from_config(cli, options.shard_examples).run(rank, ranks)
    return 0


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog=f"{program()} {args[0]}",
        description=(__doc__ or "").partition("\n\n")[2],
        epilog="All other options are the config's, as in fit: --config configs/distill.yaml, "
        "--model.init_args.objective.init_args.cache.dir=runs/teacher, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="number of GPUs, with a process each")
    parser.add_argument(
        "--shard_examples", type=int, default=1024, metavar="N", help="examples per file (22 MB with top_k 32)"
    )
    options, rest = parse_own_options(parser, args)
    check_minimum(vars(options), {"devices": 1, "shard_examples": 1})
    return options, rest


def _run_on_every_device(args: list[str], devices: int) -> int:
    """Starts a process for each GPU, waits for all of them, and returns the first exit status that is not 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(devices)))
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise UserError(
            f"--devices {devices}: there are {torch.cuda.device_count()} GPUs. Fix: give at most this number."
        )
    processes = []
    for rank in range(devices):
        environment = os.environ | {RANK: str(rank), RANKS: str(devices)}
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = names[rank]
        command = [sys.executable, str(MAIN), *args]
        processes.append(subprocess.Popen(command, env=environment))  # noqa: S603 (this program itself)
    try:
        codes = [process.wait() for process in processes]
        return next((code if code > 0 else 128 - code for code in codes if code), 0)  # below 0: killed by a signal
    finally:
        for process in processes:
            process.terminate()
