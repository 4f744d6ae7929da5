"""The door: ``python main.py COMMAND [options]``; without a command it says which there are."""

from __future__ import annotations

import logging
import sys
from importlib import import_module

from datamodules.errors import UserError

COMMANDS = {
    "fit": ("commands.cli", "trainer_command", "fine-tune; without --config the embedded default"),
    "validate": ("commands.cli", "trainer_command", "held-out loss and answers of the newest run, or of --ckpt_path"),
    "test": ("commands.cli", "trainer_command", "the same on the test split"),
    "analyze": (
        "commands.analyze.command",
        "main",
        "a scanner report, scored, correlated and summarised by a trained model",
    ),
    "export": ("commands.export.command", "main", "a run's model as PEFT or transformers load it, with a certificate"),
    "report": ("commands.report", "main", "a run as one HTML file: what ran, curves, tables, samples"),
    "inspect": ("commands.inspect.command", "main", "what a run would be given and cost, before it starts"),
    "cache-teacher": ("commands.cache_teacher", "main", "write what a frozen teacher predicts, for fits without it"),
    "synthesize": ("commands.synthesize", "main", "write findings in the scanner's wire format"),
}


def main(args: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0 done, 2 a mistake to mend, 128 + n stopped by signal n."""
    args = list(sys.argv[1:] if args is None else args)
    # where the package kernels is installed, bitsandbytes (at import) and transformers fetch and run code from the hub
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # advises to install it
    if not args or args[0] in ("-h", "--help"):
        print("usage: python main.py COMMAND [options]      (COMMAND --help lists them)\n")
        print("\n".join(f"  {name:<13} {text}" for name, (_, _, text) in COMMANDS.items()))
        return 0
    try:
        if args[0] not in COMMANDS:
            raise UserError(f"{args[0]}: no such command; there are {', '.join(COMMANDS)}")
        module, function, _ = COMMANDS[args[0]]
        return int(getattr(import_module(module), function)(args) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
