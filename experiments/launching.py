"""Starting the processes of a run (`scale.num_processes`), and watching over them.

torch.distributed.run starts them, or accelerate where the scale brings an accelerate configuration (FSDP, ZeRO). If one
dies the launcher ends the others, and what is reported is the cause, not what the others said when it was gone. The
processes of a run that another launcher has started (torchrun, srun) are told by WORLD_SIZE in their environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.files import os_errors, write_json
from experiments.signals import SIGNALS
from methods import errors
from methods.errors import AssayError, ConfigError, RunError

LOG, CONFIG, ACCELERATE = "log.txt", "run.yaml", "accelerate.yaml"
UNEXPECTED = "the run failed with"  # begins the message of every exception that is not ours
GONE = re.compile("gloo|nccl|connection (closed|reset)|broken pipe|timed out", re.IGNORECASE)


def started() -> int:
    """How many processes a launcher has started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def processes(scale: DictConfig) -> int:
    """The processes that a run asks for; null means one per GPU. ConfigError if the launcher started others."""
    wanted = scale.get("num_processes", 1)
    if wanted is None:
        wanted = gpus() or started()
        if wanted == 1 and not gpus():
            raise ConfigError(
                "there is no GPU here, and null processes means one per GPU",
                where="scale.num_processes",
                got=scale.name,
                fix="scale=cpu, or several processes on the CPU: scale=ddp scale.num_processes=2",
            )
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise ConfigError("processes are counted", where="scale.num_processes", got=wanted, expected="1 or more")
    if started() not in (1, wanted):
        raise ConfigError(
            f"a launcher started {started()} processes and the run is for {wanted}",
            where="scale.num_processes",
            got=wanted,
            fix=f"scale=ddp scale.num_processes={started()}, or leave the launcher to assay",
        )
    return wanted


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def check(cfg: DictConfig) -> None:
    """ConfigError for an objective that cannot run on sharded weights or gradients."""
    if OmegaConf.select(cfg, "scale.accelerate") and str(cfg.objective.get("_target_", "")).endswith(".Ppo"):
        raise ConfigError(
            "the critic of ppo is not sharded",
            where="scale",
            got=cfg.scale.name,
            expected="auto, cpu, gpu or ddp",
            fix="choose scale=ddp",
        )


def check_machine(scale: DictConfig) -> None:
    """ConfigError if this machine lacks what the scale needs."""
    count = processes(scale)
    if scale.device == "gpu" and not gpus():
        raise ConfigError("there is no GPU here", where="scale.device", got=scale.name, fix="scale=cpu or scale=auto")
    if gpus() and scale.device != "cpu" and count > gpus() and started() == 1:
        raise ConfigError(
            "more processes than GPUs", where="scale.num_processes", got=count, expected=f"at most {gpus()}"
        )
    packages = {"deepspeed": "DeepSpeed" if str(scale.name).startswith("zero") else "", "liger_kernel": ""}
    packages["liger_kernel"] = "Liger" if scale.get("liger") else ""
    for package, called in packages.items():
        if called and importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise ConfigError(f"{called} is not installed", where="scale", got=scale.name, fix=f"pip install {name}")


# ---------------------------------------------------------------- files and command


def accelerate_config(scale: DictConfig, count: int) -> dict[str, Any] | None:
    """The accelerate configuration of a run on `count` processes of this machine; None where none is needed."""
    if not scale.get("accelerate"):
        return None
    own: Any = OmegaConf.to_container(scale.accelerate, resolve=True)
    shared = {"compute_environment": "LOCAL_MACHINE", "debug": False, "num_machines": 1, "machine_rank": 0}
    if scale.cpu_offload:
        own |= _offloaded(own)
    precision = {"mixed_precision": "bf16" if scale.bf16 else "no"}
    return shared | own | precision | {"num_processes": count, "use_cpu": False}


def _offloaded(own: dict[str, Any]) -> dict[str, Any]:
    if "fsdp_config" in own:
        return {"fsdp_config": own["fsdp_config"] | {"fsdp_offload_params": True}}
    places = ["optimizer", "param"] if own["deepspeed_config"]["zero_stage"] == 3 else ["optimizer"]
    return {"deepspeed_config": own["deepspeed_config"] | {f"offload_{place}_device": "cpu" for place in places}}


def command(scale: DictConfig, count: int, folder: Path) -> list[str]:
    """The command line that starts `experiments.worker` in `count` processes."""
    if scale.get("accelerate"):
        how = ["accelerate.commands.launch", "--config_file", str(folder / ACCELERATE), "--main_process_port", "0"]
    else:
        how = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "--max_restarts", "0"]
    return [sys.executable, "-m", *how, "-m", "experiments.worker", str(folder)]


def prepare(cfg: DictConfig, count: int, folder: Path) -> list[str]:
    """Writes what the processes read into `folder`; the command that starts them."""
    import yaml

    with os_errors(folder):
        OmegaConf.save(cfg, folder / CONFIG)
        if made := accelerate_config(cfg.scale, count):
            (folder / ACCELERATE).write_text(yaml.safe_dump(made))
        (folder / LOG).touch()
    write_json(folder / "argv.json", sys.argv[1:])
    return command(cfg.scale, count, folder)


# ---------------------------------------------------------------- running


def start(cfg: DictConfig) -> None:
    """Runs `cfg` on several processes to its end.

    KeyboardInterrupt(signal) after a stop; else the error of the process that failed first, or RunError for one that
    died without a word.
    """
    count = processes(cfg.scale)
    with TemporaryDirectory(prefix="assay-") as name:
        folder = Path(name)
        argv = prepare(cfg, count, folder)
        # The same packages as here, whatever lies in the working directory.
        path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
        env = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "ASSAY_PARENT": str(os.getpid())}
        env.setdefault("OMP_NUM_THREADS", "1")
        with open(folder / "launcher.txt", "wb") as said:
            launcher = subprocess.Popen(argv, stdout=said, stderr=said, env=env, start_new_session=True)
        with _Watch(folder, launcher) as watch:
            watch.until_the_end()
        _judge(folder, count, launcher.returncode)


class _Watch:
    """Shows what the processes say and passes signals on to them: the first asks, the second insists."""

    def __init__(self, folder: Path, launcher: subprocess.Popen) -> None:
        self.folder, self.launcher = folder, launcher
        self._shown, self._signals = 0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Watch:
        import threading

        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._pass_on) for s in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.launcher.poll() is None:
            self._end()
        self._show()

    def until_the_end(self) -> None:
        while self.launcher.poll() is None:
            time.sleep(0.1)
            self._show()

    def _show(self) -> None:
        with open(self.folder / LOG, "rb") as file:
            file.seek(self._shown)
            text = file.read()
        self._shown += len(text)
        sys.stderr.write(text.decode("utf-8", "replace"))
        sys.stderr.flush()

    def _pass_on(self, number: int, _: Any) -> None:
        self._signals += 1
        if self._signals > 1:
            self._end()
            raise KeyboardInterrupt(number)
        _signal(self.folder, number)

    def _end(self) -> None:
        _signal(self.folder, signal.SIGKILL)
        self.launcher.kill()
        self.launcher.wait()


def _signal(folder: Path, number: int) -> None:
    for file in folder.glob("rank*.pid"):
        try:
            os.kill(int(file.read_text()), number)
        except (OSError, ValueError):  # it has just ended, or not begun
            continue


def _judge(folder: Path, count: int, code: int) -> None:
    """Raises what ended the run, unless every process finished."""
    found = {rank: file for rank in range(count) if (file := folder / f"rank{rank}.json").is_file()}
    outcomes = sorted((json.loads(file.read_text()) | {"rank": rank} for rank, file in found.items()), key=_time)
    failed = [o for o in outcomes if o["status"] == "failed"]
    begun = {int(file.stem.removeprefix("rank")) for file in folder.glob("rank*.pid")}
    lost = sorted(begun - set(found))
    causes = [o for o in failed if not _is_effect(o["error"])] or ([] if lost else failed)
    if causes:
        kind = getattr(errors, causes[0]["kind"], RunError)
        raise kind(**causes[0]["error"])
    if lost:
        raise RunError(
            f"a process of the run was killed, and the run was stopped: process {', '.join(map(str, lost))} of {count}",
            fix="look for the memory that it needed; the same line again goes on from the last checkpoint",
        )
    for outcome in outcomes:
        if outcome["status"] == "stopped":
            raise KeyboardInterrupt(outcome["signal"])
    if len(found) < count or code:
        raise RunError(
            "the processes of the run did not start",
            got=_tail(folder / "launcher.txt"),
            expected=f"{count} processes, {len(found)} came",
        )


def _is_effect(error: dict[str, Any]) -> bool:
    """Whether it is what a process says when another one is gone; an endpoint's lost connection is a cause."""
    return error["what"].startswith(UNEXPECTED) and bool(GONE.search(error["got"] or ""))


def _time(outcome: dict) -> float:
    return outcome["time"]


def _tail(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "nothing was said"


def outcome_of(error: BaseException | None) -> dict[str, Any]:
    """What a process leaves for the one that started it."""
    if error is None:
        return {"status": "finished", "time": time.time()}
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args and isinstance(error.args[0], int) else signal.SIGINT
        return {"status": "stopped", "signal": int(number), "time": time.time()}
    if not isinstance(error, AssayError):
        error = RunError(f"{UNEXPECTED} {type(error).__name__}", got=str(error))
    parts = {k: getattr(error, k) for k in ("what", "where", "got", "expected", "fix")}
    parts["got"] = None if error.got is None else str(error.got)
    return {"status": "failed", "kind": type(error).__name__, "error": parts, "time": time.time()}
