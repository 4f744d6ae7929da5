"""A run's curves from TensorBoard's events, those of its resumed parts too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from callbacks.reporting.figures import blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 400  #: of a curve; more can't be seen
#: title -> the scalars that share the picture
CURVES = {
    "loss": ("train/loss", "val/loss"),
    "token accuracy": ("train/token_accuracy", "val/token_accuracy"),
    "divergence from the teacher": ("train/kl", "val/kl"),
    "gradient norm": ("train/grad_norm",),
    "learning rate": ("lr",),
    "findings a second": ("throughput/findings_per_second",),
    "peak memory, GiB": ("memory/peak_gib",),
}


def curves(run: Path) -> dict[str, Figure]:
    """Draws what the run logged, by title; nothing where there are no events."""
    scalars = read_scalars(run)
    drawn = {}
    for title, names in CURVES.items():
        present = {name: scalars[name] for name in names if name in scalars}
        if not present:
            continue
        figure, axes = blank()
        for name, points in present.items():
            thin = points[:: max(1, len(points) // POINTS)]
            steps, values = [step for step, _ in thin], [value for _, value in thin]
            axes.plot(steps, values, marker="o" if len(thin) < 20 else None, markersize=4, label=name)
        if title in ("loss", "gradient norm") and min(v for points in present.values() for _, v in points) > 0:
            axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(present) > 1:
            axes.legend(fontsize=8)
        drawn[title] = figure
    return drawn


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a run: name -> (step, value), in order of steps; of a step logged twice the later value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(run.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: sorted({event.step: event.value for event in events.Scalars(name)}.items()) for name in names}
