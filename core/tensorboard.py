"""Files of the scalars of a run that TensorBoard displays."""

from pathlib import Path
from typing import Any


class TensorBoard:
    """Event files of a run: `steps` holds the values of log lines by step, `epochs` those of log.txt by epoch.

    TensorBoard drops what an earlier session wrote after the place where this one continues, with `epoch` epochs and
    `step` steps completed. The two have folders of their own, because each counts this place in another unit.
    """

    def __init__(self, folder: Path, epoch: int, step: int):
        from torch.utils.tensorboard import SummaryWriter  # needs an optional package

        self.steps = SummaryWriter(str(folder / "steps"), purge_step=step + 1)
        self.epochs = SummaryWriter(str(folder / "epochs"), purge_step=epoch)

    def add_step(self, line: dict[str, Any]) -> None:
        """Add the losses and the learning rate of a line of metrics.jsonl."""
        for name, value in line.items():
            if name not in ("epoch", "step", "steps", "global_step"):
                self.steps.add_scalar(name, value, line["global_step"])

    def add_epoch(self, figures: dict[str, float], epoch: int) -> None:
        """Add the figures of an epoch, counted from 0."""
        for name, value in figures.items():
            self.epochs.add_scalar(name, value, epoch)

    def flush(self) -> None:
        """Write everything that was added to the files."""
        self.steps.flush()
        self.epochs.flush()

    def close(self) -> None:
        """Write everything, and close the files."""
        self.steps.close()
        self.epochs.close()
