"""One process of a run on several: `python -m experiments.worker FOLDER`, started by `experiments.launching`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from omegaconf import OmegaConf

from experiments.files import write_json
from experiments.launching import CONFIG, LOG, outcome_of


def main(folder: Path) -> None:
    """Takes part in the run whose configuration lies in `folder` and leaves the outcome there."""
    rank = os.environ["RANK"]
    log = os.open(folder / LOG, os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    threading.Thread(target=_end_with, args=(int(os.environ["ASSAY_PARENT"]),), daemon=True).start()
    sys.argv = ["assay", *json.loads((folder / "argv.json").read_text())]
    error: BaseException | None = None
    try:
        from experiments.run import take_part

        take_part(OmegaConf.load(folder / CONFIG))  # type: ignore[arg-type]
    except BaseException as failure:
        error = failure
    outcome = outcome_of(error)
    write_json(folder / f"rank{rank}.json", outcome)
    sys.stderr.flush()
    if outcome["status"] == "failed":
        os._exit(1)  # a library's clean-up could wait for processes that are gone
    _part()


def _part() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_with(parent: int) -> None:
    """Ends this process when the one that started the run is gone, so that nobody writes its record any more."""
    while True:
        try:
            os.kill(parent, 0)
        except OSError:
            os._exit(1)
        time.sleep(0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
