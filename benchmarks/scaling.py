"""Measures how the cost of a step grows with row length, adapter rank and model size, on one GPU.

    python benchmarks/scaling.py --tokens tokens.npz [--axes rows ranks layers] [--output scaling.json]

From one point (Mistral-7B shapes in NF4, LoRA r=64, rows of 8,192 tokens with a shared prefix) one axis is varied at a
time; the size of the model by its number of layers. Each point is a process of its own (see ``train_step.py`` for the
figures and for the token file).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import run, train  # noqa: E402

START = {"rows": 8192, "ranks": 64, "layers": 32}
AXES = {"rows": [2048, 4096, 8192, 16384, 32768], "ranks": [8, 16, 64, 256], "layers": [8, 16, 32, 48]}


def point(settings: dict[str, int], tokens: str, steps: int) -> dict[str, float]:
    """Measures one point; rows of 32,768 tokens use selective checkpointing, since ``none`` would not fit 80 GB."""
    from lightning_modules import Backbone, LoRA

    config = json.loads((ROOT / "benchmarks" / "mistral-7b" / "config.json").read_text())
    checkpointing = "selective" if settings["rows"] * settings["layers"] > 16384 * 36 else "none"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config | {"num_hidden_layers": settings["layers"]}))
        lora = LoRA(settings["ranks"], 2 * settings["ranks"])
        backbone = Backbone(f"random:{folder}", "nf4", "bfloat16", lora=lora, activation_checkpointing=checkpointing)
        figures = train(backbone, tokens, settings["rows"], "shared_prefix", steps, 3)
    return {**settings, "memory": checkpointing, **figures}


def main() -> None:
    """Parses the command line and measures every point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", required=True, help="token file")
    parser.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", help="JSON file of every point")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("RESULT " + json.dumps(point(options.child, options.tokens, options.steps)))
        return
    results = []
    print("| rows | rank | layers | memory | ms/step | computed tokens/s | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for settings in (START | {axis: value} for axis in options.axes for value in AXES[axis]):
        command = [sys.executable, __file__, "--child", json.dumps(settings)]
        result = run([*command, "--tokens", options.tokens, "--steps", str(options.steps)], ROOT)
        if result is not None:
            results.append(result)
            print(
                f"| {result['rows']:,} | {result['ranks']} | {result['layers']} | {result['memory']} | "
                f"{result['ms_step']:,.0f} | {result['computed_tokens_s']:,.0f} | {result['peak_gib']:.1f} |",
                flush=True,
            )
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
