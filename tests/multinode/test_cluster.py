"""Several real Ray nodes on this machine: jobs with a token, placement, nodes that are lost and nodes that join."""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from upath import UPath

from cluster.local import LocalCluster
from ensemble.report.write import PAGE
from tests.small_run import train_run
from tests.tiny_space import write_space
from trainables.run.records import read_records
from trainables.run_directory import CandidateInfo, list_candidates
from trainables.storage import read_json
from trainables.training.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds that a step may take on a busy machine before the test gives up


PARTS = ("ImplicitFunc", "Mailbox", "TrainController", "RayTrainWorker")  # of a trial: Tune's, ours, Ray Train's


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as started:
        yield started


def submission(run: Path | str, space: Path, *more: str) -> list[str]:
    """`ray job submit ...`: everything but the dependencies, which this machine has."""
    environment = yaml.safe_load((ROOT / "cluster/launch/runtime_env.yaml").read_text())
    assert environment.pop("pip")
    return [
        "job", "submit", "--working-dir", str(ROOT), "--runtime-env-json", json.dumps(environment), *more, "--",
        "python", "-m", "search.run", "--data", "digits", "--space", str(space), "--run", str(run), "--pruner", "none",
    ]  # fmt: skip


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.1)


@pytest.mark.cluster
def test_a_job_sweeps_on_two_nodes_and_leaves_what_a_local_run_does(
    cluster: LocalCluster, tmp_path: Path, pictures: Path
) -> None:
    space, run = tmp_path / "tiny.py", tmp_path / "run"
    write_space(space, trials=4, epochs=2, batch_size=64)
    submit = submission(run, space)
    stranger = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    refused = cluster.ray(*submit, check=False, **stranger)
    assert refused.returncode != 0
    assert "Unauthorized" in refused.stdout + refused.stderr
    for _ in range(2):
        cluster.add_node(cpus=1)

    output = cluster.ray(*submit).stdout
    candidates = list_candidates(UPath(run))
    assert [candidate.id for candidate in candidates] == ["0000", "0001", "0002", "0003"]
    assert {candidate.info.node.split()[0] for candidate in candidates} == {"127.0.0.2", "127.0.0.3"}
    for id in ("0000", "0001", "0002", "0003"):  # plain lines
        assert any(line.startswith(f"{id} speednet") and "finished" in line for line in output.splitlines())
    assert "\x1b[?25l" not in output  # no screen that is redrawn
    assert "2 trials at a time" in output

    local, _ = train_run(tmp_path / "local", pictures, trials=1)
    ours, theirs = candidates[0], list_candidates(local)[0]
    assert read_json(ours.path / "candidate.json").keys() == read_json(theirs.path / "candidate.json").keys()
    assert {path.name for path in ours.path.iterdir()} == {path.name for path in theirs.path.iterdir()}
    assert read_json(UPath(run) / "run.json").keys() == read_json(local / "run.json").keys()
    assert (run / "data").is_dir()  # for the nodes that the images are not on
    not_always = {PAGE, "report.json", "looks.json", "latencies.json", "study.db", "checkpoints", ".lock", "data"}
    names = [{path.name for path in folder.iterdir()} - not_always for folder in (run, Path(str(local)))]
    assert names[0] == names[1]


@pytest.mark.cluster
def test_what_a_job_says_and_how_it_ends(cluster: LocalCluster, tmp_path: Path) -> None:
    space, run = tmp_path / "tiny.py", tmp_path / "run"
    write_space(space, trials=2, epochs=100, batch_size=64)
    failed = cluster.ray(*submission("runs/relative", space), check=False)
    assert failed.returncode != 0
    assert "would lie in the job's copy" in failed.stdout

    cluster.add_node(cpus=1)
    cluster.ray(*submission(run, space, "--no-wait", "--submission-id", "first"))
    wait_until((run / "checkpoints/0000/state.safetensors").exists, "a first epoch")
    cluster.ray("job", "stop", "first")
    assert "was stopped" in cluster.ray("job", "status", "first").stdout
    assert "stopped; the same command goes on" in cluster.ray("job", "logs", "first").stdout
    assert not (run / "candidates").exists()
    space.write_text(space.read_text().replace("TRIALS = 2", "TRIALS = 1"))
    cluster.ray(*submission(run, space))
    (candidate,) = list_candidates(UPath(run))
    assert candidate.info.resumed_after_epochs


@pytest.mark.cluster
def test_a_lost_machine_costs_at_most_a_tenth_of_an_epoch(cluster: LocalCluster, tmp_path: Path) -> None:
    """Before: a lost trial went on from its last whole epoch, however long that had been ago."""
    space, run = tmp_path / "long_epochs.py", tmp_path / "run"
    write_space(space, trials=3, epochs=2, batch_size=8)
    space.write_text(space.read_text().replace("width=0.25, image_size=16", "width=0.5, image_size=112"))
    nodes = [cluster.add_node(cpus=1) for _ in range(3)]
    cluster.ray(*submission(run, space, "--no-wait", "--submission-id", "first"))
    wait_until(
        lambda: len(shares := saved_within_an_epoch(run)) == 3 and all(shares.values()), "three trials, well begun"
    )
    saved = saved_within_an_epoch(run)
    actors = json.loads(cluster.ray("list", "actors", "--format", "json", "--filter", "state=ALIVE").stdout)
    machines = {name: [actor["node_id"] for actor in actors if name in actor["class_name"]] for name in PARTS}
    assert machines["ImplicitFunc"], sorted({actor["class_name"] for actor in actors})
    (head,) = set(machines.pop("ImplicitFunc"))  # where those wait that are told of a trial
    for of_part in machines.values():  # and everything else of a lane is together
        assert len(of_part) == len(set(of_part)) == 3
        assert head not in of_part
    nodes[0].kill()
    wait_until(lambda: len(list_candidates(UPath(run))) == 3 and (run / "report.json").exists(), "the sweep's end")
    resumed = {c.id: c.info.resumed_after_epochs for c in list_candidates(UPath(run)) if c.info.resumed_after_epochs}
    assert len(resumed) == 1, "the trials on other machines train on"
    for id, times in resumed.items():
        assert times[0] >= saved[id] - 0.005, (
            "what was saved is not trained again, and a tenth of an epoch lies between two"
        )
        assert times[0] % 1 > 0
    wait_until(lambda: "succeeded" in cluster.ray("job", "status", "first").stdout, "the job's end")
    logs = cluster.ray("job", "logs", "first").stdout
    assert "the cluster's machines predict the test part" in logs  # the head has no CPU slot
    assert read_json(UPath(run) / "report.json")["test"]["ensemble"]["images"] == 719


def saved_within_an_epoch(run: Path) -> dict[str, float]:
    """By trial, how many epochs its checkpoint holds; 0 for one that lies at an epoch's end."""
    shares = {}
    for path in run.glob("checkpoints/*/state.safetensors"):
        state = read_checkpoint(UPath(path), torch.device("cpu"))
        assert state is not None
        progress = state["progress"]
        shares[path.parent.name] = (
            progress["epoch"] + progress["step"] / progress["steps"] if progress["steps"] else 0.0
        )
    return shares


@pytest.mark.cluster
def test_nodes_leave_and_join_and_the_head_is_replaced(cluster: LocalCluster, tmp_path: Path) -> None:
    space, run = tmp_path / "tiny.py", tmp_path / "run"
    write_space(space, trials=12, epochs=60, batch_size=64)  # enough that some are left when the head is replaced
    nodes = [cluster.add_node(cpus=1) for _ in range(2)]
    cluster.ray(*submission(run, space, "--no-wait", "--submission-id", "first"))
    wait_until(lambda: len(list(run.glob("checkpoints/*/state.safetensors"))) == 2, "two trials")
    wait_until(lambda: "ray_ninefold_trials{" in metrics(cluster), "the sweep among the metrics")
    assert 'state="running"' in metrics(cluster)
    nodes[0].kill()  # 127.0.0.2
    time.sleep(3)  # for reports on their way; its trial cannot go on elsewhere so soon
    told = epochs_told(run)

    def finished() -> dict[str, CandidateInfo]:
        return {candidate.id: candidate.info for candidate in list_candidates(UPath(run))}

    wait_until(lambda: {"0000", "0001"} <= finished().keys(), "the lost trial's end on the other node")
    cluster.add_node(cpus=1)  # 127.0.0.4
    joined = time.time()
    wait_until(lambda: any("127.0.0.4" in info.node for info in finished().values()), "a trial on the new node")
    for info in finished().values():
        if "127.0.0.4" in info.node:
            print(
                "the new node's first trial began",
                (info.finished or 0) - (info.seconds or 0) - joined,
                "s after it joined",
            )
    cluster.nodes[0].kill()
    before = finished()
    for node in cluster.nodes:
        node.kill()
    cluster.start_head()
    cluster.add_node(cpus=1)
    output = cluster.ray(*submission(run, space)).stdout
    assert "going on with" in output
    after = finished()
    assert sorted(after) == [f"{number:04d}" for number in range(12)]
    assert all(after[id] == info for id, info in before.items())
    lost = [after[id] for id in ("0000", "0001") if after[id].resumed_after_epochs]
    assert len(lost) == 1, "one of the first two was on the node that was killed"
    assert lost[0].resumed_after_epochs[0] >= told[lost[0].id] - 1, "at most one epoch is trained again"
    for info in after.values():
        assert [row["epoch"] for row in info.curve] == list(range(1, 61))


def epochs_told(run: Path) -> dict[str, int]:
    """The last epoch that the records know of every trial."""
    return {record.id: max((epoch for epoch, _ in record.scores), default=0) for record in read_records(UPath(run))}


def metrics(cluster: LocalCluster) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.metrics_port}/metrics") as answer:
        return answer.read().decode()


@pytest.mark.cluster
def test_a_trial_on_two_nodes_reaches_what_it_does_on_one(cluster: LocalCluster, tmp_path: Path) -> None:
    space = tmp_path / "tiny.py"
    # nothing is left to the sampler: both runs train the same configuration
    write_space(space, trials=1, epochs=8, batch_size=64, lr=(1e-2, 1e-2))
    for _ in range(2):
        cluster.add_node(cpus=1)
    found = {}
    for workers in (1, 2):
        run = tmp_path / f"run{workers}"
        output = cluster.ray(*submission(run, space), "--workers-per-trial", str(workers)).stdout
        (found[workers],) = list_candidates(UPath(run))
        assert ("2 x 1 CPUs each" in output) == (workers == 2)
    one, two = (found[workers].info.metrics for workers in (1, 2))
    images = one["select_images"]
    noise = (2 * one["select_accuracy"] * (1 - one["select_accuracy"]) / images) ** 0.5  # of a difference, one sigma
    assert abs(one["select_accuracy"] - two["select_accuracy"]) < 3 * max(noise, 1 / images)
    assert one["select_accuracy"] > 0.9
