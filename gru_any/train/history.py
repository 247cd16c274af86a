"""What a training run wrote down: the records of its log, and a picture of them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_atomically

PICTURED = {"loss": "loss", "rate": "learning rate", "norm": "norm of the gradient"}


class History(NamedTuple):
    """The end of a training run.

    Attributes
    ----------
    records : list of dict
        With "step", "epoch", "seconds", and either "loss", "rate" and "norm" (means since the
        record before, but the rate; with mixed precision "scale" too), or "valid".
    reason : str
        Why it ended: "done", "patience", "minutes" or "interrupted"; "finished" where it had
        ended before.
    best : float or None
        The lowest validation loss.
    """

    records: list[dict[str, Any]]
    reason: str
    best: float | None

    def draw(self, path: Any) -> None:
        """Write a PNG of loss, learning rate and gradient norm against the step."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
        for axis, (key, label) in zip(axes, PICTURED.items(), strict=True):
            steps, values = self.column(key)
            axis.plot(steps, values, color="tab:blue", label="training")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        steps, values = self.column("valid")
        axes[0].plot(steps, values, "o-", color="tab:orange", markersize=3, label="validation")
        axes[0].legend()
        axes[2].set_yscale("log")
        axes[2].set_xlabel("step")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def column(self, key: str) -> tuple[list[int], list[float]]:
        """The steps and values of the records that have this key."""
        rows = [(r["step"], r[key]) for r in self.records if key in r]
        return [step for step, _ in rows], [value for _, value in rows]


class Log:
    """Records, and a file of JSON lines that holds the same (path None: no file)."""

    def __init__(self, path: Path | None, records: list[dict[str, Any]]) -> None:
        self.path, self.records = path, records
        if path is not None:  # what an interrupted run wrote after its checkpoint goes
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(path, lines.encode())

    def write(self, record: dict[str, Any]) -> None:
        """Add a record; OSError where the file cannot be written."""
        self.records.append(record)
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as e:
                raise OSError(
                    e.errno,
                    f"the log {self.path} was not written ({e.strerror}); make room, and "
                    "start again: the run goes on from its last checkpoint",
                ) from e
