"""Training curves of a run from TensorBoard's events, including those of its resumed parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from callbacks.reporting.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 400  #: points per curve; more are not visible
#: title -> scalars of the plot
CURVES = {
    "loss": ("train/loss", "val/loss"),
    "token accuracy": ("train/token_accuracy", "val/token_accuracy"),
    "divergence from the teacher": ("train/kl", "val/kl"),
    "gradient norm": ("train/grad_norm",),
    "learning rate": ("lr",),
    "findings per second": ("throughput/findings_per_second",),
    "peak memory, GiB": ("memory/peak_gib",),
}


def draw_curves(run: Path) -> dict[str, Figure]:
    """Draws the logged curves of a run, by title; an empty dict if there are no events."""
    scalars = read_scalars(run)
    drawn = {}
    for title, names in CURVES.items():
        present = {name: scalars[name] for name in names if name in scalars}
        if not present:
            continue
        figure, axes = new_figure()
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
    """Reads every scalar of a run.

    Args:
        run: run directory.

    Returns:
        Name -> (step, value), in order of steps. If a step was logged twice, the later value is returned.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(run.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: sorted({event.step: event.value for event in events.Scalars(name)}.items()) for name in names}
