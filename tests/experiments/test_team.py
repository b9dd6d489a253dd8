"""The processes of a run: shares, meetings, launch files, and what is refused before anything starts."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from experiments import launching
from experiments.services import Services
from experiments.team import ALONE, Team
from methods.base import Segment, Trajectory, assemble
from methods.errors import AssayError, ConfigError, RunError

SCALE = Path(__file__).resolve().parents[2] / "conf" / "scale"
GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_are_whole_units_and_cover_everything_once(size):
    for groups in range(9):
        parts = [range(groups * 4)[Team(rank, size).part(groups * 4, 4)] for rank in range(size)]
        assert [i for part in parts for i in part] == list(range(groups * 4))
        assert all(len(part) % 4 == 0 for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 4


def test_rows_of_a_batch_are_spread_and_trimmed():
    trajs = [Trajectory(str(i), 0, i, [Segment([1], [5] * (i + 1))]) for i in range(5)]
    batch = assemble(trajs, 0)
    mine = [Team(rank, 2).rows_of(batch) for rank in range(2)]
    assert [part.traj_S.tolist() for part in mine] == [[0, 2, 4], [1, 3]]
    assert mine[1].completion_ids_ST.shape == (2, 4) and ALONE.rows_of(batch) is batch


class Round:
    """A team whose meetings are between threads."""

    def __init__(self, size):
        self.size, self.barrier, self.parts = size, threading.Barrier(size, timeout=20), {}

    def run(self, work):
        """work(team) in every thread; results by rank, exceptions as values."""
        out = {}

        def one(rank):
            team = Threaded(rank, self.size)
            object.__setattr__(team, "round", self)
            try:
                out[rank] = work(team)
            except Exception as error:
                out[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return [out[rank] for rank in range(self.size)]


class Threaded(Team):
    def joined(self, mine):
        shared = self.round
        shared.parts[self.rank] = list(mine)
        shared.barrier.wait()
        found = [item for rank in range(self.size) for item in shared.parts[rank]]
        shared.barrier.wait()
        return found


def test_work_is_divided_and_joined_in_order():
    done = []

    def work(items):
        done.append(len(items))
        return [i * i for i in items]

    out = Round(3).run(lambda team: team.divided(range(7), work))
    assert out == [[i * i for i in range(7)]] * 3 and sorted(done) == [2, 2, 3]
    assert Round(3).run(lambda team: team.divided([], work)) == [[]] * 3


def test_what_one_process_cannot_do_all_hear_of():
    def work(items):
        return [1 / (i - 5) for i in items]

    out = Round(2).run(lambda team: team.divided(range(8), work))
    assert all(isinstance(o, ZeroDivisionError) for o in out)

    class Local(Exception):  # cannot be pickled
        pass

    def odd(items):
        raise Local("here")

    assert all(isinstance(o, RunError) and "Local: here" in str(o) for o in Round(2).run(lambda t: t.divided([1], odd)))


def test_means_totals_and_agreement():
    def work(team):
        nan = float("nan")
        own = {"both": float(team.rank), "some": nan if team.rank else 3.0} | ({"one": 2.0} if team.rank else {})
        return team.mean(own), team.total({"tokens": team.rank + 1}), team.largest(team.rank)

    for mean, total, largest in Round(2).run(work):
        assert mean == {"both": 0.5, "some": 3.0, "one": 2.0} and total == {"tokens": 3} and largest == 1
    out = Round(2).run(lambda team: team.agree("their rows", team.rank))
    assert all("the processes differ in their rows" in str(o) for o in out)
    assert Round(2).run(lambda team: team.from_main(lambda: team.rank)) == [0, 0]


def test_rollouts_keep_their_rows_when_they_travel():
    rows = [object(), object()]

    def work(team):
        mine = Trajectory("r", team.rank, 0, [], row=rows[team.rank])
        return team.trajectories([mine], rows)

    for trajs in Round(2).run(work):
        assert [t.group_id for t in trajs] == [0, 1] and [t.row for t in trajs] == rows


class Counting:
    name, asked = "counting", 0

    def generate(self, requests):
        from types import SimpleNamespace

        self.asked += len(requests)
        usage = SimpleNamespace(completion_tokens=1)
        return [[SimpleNamespace(text=f"{r.prompt}/{r.seed % 97}", usage=usage)] for r in requests]


def test_services_divide_their_work_and_draw_the_same_except_apart():
    def work(team):
        engine = Counting()
        services = Services(engine, None, 0, None)
        services.team = team
        asked = [{"prompt": str(i)} for i in range(5)]
        together = [r[0].text for r in services.generate(asked, "x")]
        noise = services.rng("n").random(), services.gather(torch.ones(1))
        with services.apart():
            alone = [r[0].text for r in services.generate(asked, "x")]
            return together, engine.asked, noise, alone, services.rng("n").random()

    single = work(ALONE)
    one, two = Round(2).run(work)
    assert one[0] == two[0] == single[0] and one[1] + two[1] == 5 + 2 * 5
    assert one[2] == two[2] == single[2] and one[3] == single[3] != two[3] and one[4] != two[4]


# ---------------------------------------------------------------- launch files


def scale(name, **keys):
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.load(SCALE / f"{name}.yaml")) | keys)


@pytest.mark.parametrize("name, keys", [
    ("ddp", {}), ("fsdp2", {}), ("fsdp2", {"cpu_offload": True}), ("zero2", {}), ("zero3", {"cpu_offload": True}),
])  # fmt: skip
def test_launch_files_are_the_golden_ones(name, keys, tmp_path):
    """The command and the configuration; after an intended change, write what the assertion shows to the file."""
    made = launching.accelerate_config(scale(name, **keys), 8)
    argv = launching.command(scale(name, **keys), 8, Path("FOLDER"))
    shown = yaml.safe_dump({"command": argv[1:], "accelerate": made}, sort_keys=True)
    assert shown == (GOLDEN / f"{name}{'_offload' if keys else ''}.yaml").read_text()


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configuration_as_it_is_meant(name, tmp_path):
    """A dry run: accelerate's own parser and the environment that it would give to the processes."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(launching.accelerate_config(scale(name, cpu_offload=True), 8)))
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and config.mixed_precision == "bf16" and not config.use_cpu
    own = config.fsdp_config if name == "fsdp2" else config.deepspeed_config
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert set(own) <= known, set(own) - known
    argv = launching.command(scale(name), 8, tmp_path)
    parsed = parser.parse_args(argv[3:])
    assert parsed.module and parsed.training_script == "experiments.worker" and parsed.config_file == str(file)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("keys, words", [
    ({"num_processes": 0}, "1 or more"), ({"num_processes": "two"}, "1 or more"), ({"num_processes": True}, "counted"),
])  # fmt: skip
def test_processes_are_counted(keys, words):
    with pytest.raises(ConfigError, match=words):
        launching.processes(scale("ddp", **keys))


def test_no_gpu_is_one_paragraph(monkeypatch):
    monkeypatch.setattr(launching, "gpus", lambda: 0)
    with pytest.raises(ConfigError, match=r"no GPU here.*one per GPU.*scale.num_processes=2"):
        launching.processes(scale("ddp"))
    for name in ("gpu", "fsdp2"):
        with pytest.raises(ConfigError, match=r"no GPU here.*scale=cpu"):
            launching.check_machine(scale(name, num_processes=1))
    monkeypatch.setattr(launching, "gpus", lambda: 2)
    assert launching.processes(scale("ddp")) == 2
    with pytest.raises(ConfigError, match="more processes than GPUs"):
        launching.check_machine(scale("ddp", num_processes=3))


def test_a_launcher_that_started_others_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"started 2 processes and the run is for 1.*scale=ddp"):
        launching.processes(scale("cpu"))
    with pytest.raises(ConfigError, match="started 2 processes and the run is for 4"):
        launching.processes(scale("ddp", num_processes=4))
    assert launching.processes(scale("ddp", num_processes=2)) == 2


def test_one_process_in_place_of_two_does_not_pass_silently():
    """`accelerate launch --cpu --num_processes 2` starts one process."""
    with pytest.raises(ConfigError, match=r"another number of processes.*Got: 1.*Expected: 2"):
        Team.meet(2, use_cpu=True)


def test_missing_packages_and_ppo_are_refused(monkeypatch):
    monkeypatch.setattr(launching, "gpus", lambda: 8)
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"DeepSpeed is not installed.*pip install deepspeed"):
        launching.check_machine(scale("zero3"))
    with pytest.raises(ConfigError, match=r"Liger is not installed.*pip install liger-kernel"):
        launching.check_machine(scale("ddp", liger=True))
    ppo = {"_target_": "methods.objectives.ppo.Ppo"}
    for name in ("fsdp2", "zero2", "zero3"):
        with pytest.raises(ConfigError, match="the critic of ppo is not sharded"):
            launching.check(OmegaConf.create({"scale": scale(name), "objective": ppo}))
    launching.check(OmegaConf.create({"scale": scale("ddp"), "objective": ppo}))


def outcomes(tmp_path, *results, begun=2):
    for rank in range(begun):
        (tmp_path / f"rank{rank}.pid").write_text("1")
    for rank, error in results:
        launching.write_json(tmp_path / f"rank{rank}.json", launching.outcome_of(error))
    for name in (launching.LOG, "launcher.txt"):
        (tmp_path / name).write_text("a line\n")
    launching._judge(tmp_path, 2, 1 if results else 0)


def test_the_cause_is_reported_and_not_its_echo(tmp_path):
    echo = RunError("the run failed with RuntimeError", got="[gloo] Connection closed by peer [127.0.0.1]:3")
    with pytest.raises(ConfigError, match=r"Where: reward"):
        outcomes(tmp_path, (0, echo), (1, ConfigError("wrong", where="reward")))
    (tmp_path / "rank1.json").unlink()
    with pytest.raises(RunError, match="process 1 of 2"):
        outcomes(tmp_path, (0, echo))


def test_a_stop_is_a_stop_and_a_launcher_that_starts_nothing_says_why(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stop:
        outcomes(tmp_path, (0, KeyboardInterrupt(15)), (1, KeyboardInterrupt(15)))
    assert stop.value.args == (15,)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(RunError, match=r"did not start.*a line"):
        outcomes(tmp_path, begun=0)


# ---------------------------------------------------------------- sharded weights


def test_unsharded_weights_forward_without_the_other_processes(tmp_path):
    """FSDP2 on one process (gloo): inside, a forward meets nobody; outside, the weights are sharded as before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from experiments.team import unsharded

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        x, expected = torch.ones(3, 4), None
        expected = model(x).detach()
        mesh = init_device_mesh("cpu", (1,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with unsharded(model), torch.no_grad():
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            torch.testing.assert_close(model(x), expected)
            assert not any(isinstance(p, DTensor) for p in model.parameters())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- what ended the run


GLOO = RunError("the run failed with RuntimeError", got="[gloo] Connection closed by peer [127.0.0.1]")
SERVICE = RunError("The endpoint does not answer", got="ReadError: connection reset by peer (tries: 8)")


@pytest.mark.parametrize(
    "outcomes, said",
    [
        ([GLOO, SERVICE], "The endpoint does not answer"),  # a lost connection is the cause, not the effect
        ([GLOO, ConfigError("a wrong word")], "a wrong word"),
        ([GLOO, None], "process 1 of 2"),  # killed: it left no word
        ([GLOO, GLOO], "Connection closed by peer"),
    ],
)
def test_the_error_of_a_run_is_its_cause(outcomes, said, tmp_path):
    for rank, error in enumerate(outcomes):
        (tmp_path / f"rank{rank}.pid").write_text("1")
        if error is not None:
            (tmp_path / f"rank{rank}.json").write_text(json.dumps(launching.outcome_of(error)))
    with pytest.raises(AssayError) as caught:
        launching._judge(tmp_path, 2, 1)
    assert said in str(caught.value) and "launcher" not in str(caught.value)
