"""Measures the cost of trainer, loader and callbacks: ``main.py fit`` next to a bare loop over the same batches.

    python benchmarks/end_to_end.py --steps 40 -- --config benchmarks/end_to_end.yaml [any option of fit]

The bare loop loads its batches into memory first, and runs only forward, backward, clipping and the optimizer. Then
``main.py fit`` runs the same config in a process of its own, with every callback; its speed is read from the logged
curves, without the first interval. Prints both in findings/s, and the difference.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

WARMUP = 4


def bare(arguments: list[str], steps: int) -> float:
    """Returns the findings/s of a loop over batches in memory."""
    import torch

    from commands.cli import FinetuneCLI

    cli = FinetuneCLI(arguments, run=False)
    module, device = cli.model, cli.trainer.strategy.root_device
    cli.datamodule.setup()
    batches = list(islice(cli.datamodule.train_batches(), WARMUP + steps))
    with torch.device(device):
        module.configure_model()
    module.to(device).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = module.optimizer(parameters)
    for index, batch in enumerate(batches):
        if index == WARMUP:
            _wait(device)
            start = time.monotonic()
        sums = module.compute_sums(module.transfer_batch_to_device(batch, device, 0))
        sums["loss"].backward()
        torch._foreach_mul_([p.grad for p in parameters], 1 / sums["count"])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _wait(device)
    return sum(batch.findings for batch in batches[WARMUP:]) / (time.monotonic() - start)


def _wait(device: object) -> None:
    import torch

    if torch.device(str(device)).type == "cuda":
        torch.cuda.synchronize()


def through_fit(arguments: list[str], steps: int) -> float:
    """Returns the findings/s that ``main.py fit`` logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        options = [f"--trainer.max_steps={WARMUP + steps}", f"--trainer.logger.init_args.save_dir={folder}"]
        subprocess.run([sys.executable, "main.py", "fit", *arguments, *options], cwd=ROOT, check=True)
        (events,) = Path(folder).rglob("events.out.tfevents.*")
        curves = EventAccumulator(str(events))
        curves.Reload()
        rates = [point.value for point in curves.Scalars("throughput/findings_per_second")]
    return sum(rates[1:]) / len(rates[1:])


def main() -> None:
    """Parses the command line and runs both loops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", choices=("bare", "fit"), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help="options of main.py fit, after --")
    options = parser.parse_args()
    if options.only == "bare":  # in a process of its own, so that its memory is freed
        print(f"BARE {bare(options.arguments, options.steps)}")
        return
    command = [sys.executable, __file__, "--only", "bare", "--steps", str(options.steps), "--", *options.arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rates = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("BARE ")]
    if not rates:
        sys.exit(done.stdout + done.stderr)
    loop, fit = float(rates[0]), through_fit(options.arguments, options.steps)
    print(f"bare loop {loop:.1f} findings/s, main.py fit {fit:.1f} findings/s: {1 - fit / loop:.1%} overhead")


if __name__ == "__main__":
    main()
