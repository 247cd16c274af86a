"""The log of a training run, and a picture of it."""

import json
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ..files import write_atomically
from ..typing import Path as PathLike

Record: TypeAlias = dict[str, float]
PICTURED = {"loss": "loss", "rate": "learning rate", "norm": "norm of the gradient"}


class History(NamedTuple):
    """The result of a training run.

    Attributes
    ----------
    records : list of dict
        Each with "step", "epoch", "seconds", and either "loss", "rate" and "norm" (loss and norm
        are means since the record before; with mixed precision also "scale"), or "valid".
    reason : str
        Why it ended: "done", "patience", "minutes" or "interrupted"; "finished" if it had ended
        before.
    best : float or None
        The lowest validation loss.
    """

    records: list[Record]
    reason: str
    best: float | None

    def draw(self, path: PathLike) -> None:
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
        """Return the steps and values of the records that have this key."""
        rows = [(int(r["step"]), r[key]) for r in self.records if key in r]
        return [step for step, _ in rows], [value for _, value in rows]


class Log:
    """Records, and a file of JSON lines that holds the same records (path None: no file)."""

    def __init__(self, path: Path | None, records: list[Record]) -> None:
        self.path, self.records = path, records
        if path is not None:  # drops what an interrupted run wrote after its last checkpoint
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(path, lines.encode())

    def write(self, record: Record) -> None:
        """Add a record; raise OSError if the file cannot be written."""
        self.records.append(record)
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as e:
                raise OSError(
                    e.errno,
                    f"the log {self.path} was not written ({e.strerror}); make room, and "
                    "start again: the run goes on from its last checkpoint, if it has one",
                ) from e
