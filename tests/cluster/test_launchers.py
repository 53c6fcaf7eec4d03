"""The files in cluster/ that start a cluster: their schemas, their commands, no secrets; and Slurm for real."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.runtime_env import RuntimeEnv

from cluster.connect import free_port
from cluster.metrics import GAUGES
from tests import kuberay_schema

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster/launch"
RAY_UP = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())  # what `ray up` checks
COMMANDS = {
    "cloud.yaml": "ray up cluster/launch/cloud.yaml",
    "on_premise.yaml": "ray up cluster/launch/on_premise.yaml",
    "kuberay.yaml": "kubectl apply -f cluster/launch/kuberay.yaml",
    "rayjob.yaml": "kubectl apply -f cluster/launch/rayjob.yaml",
    "slurm.sh": "sbatch ",
    "runtime_env.yaml": "ray job submit --working-dir . --runtime-env cluster/launch/runtime_env.yaml",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_says_its_command_first_and_holds_no_secret(name: str) -> None:
    text = (FOLDER / name).read_text()
    first = [line for line in text.splitlines()[:8] if line.startswith("#")]
    assert any(COMMANDS[name] in line for line in first)
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|(?i:password|secret_access_key)\s*[:=]", text)
    assert not re.search(r"(?<![0-9a-zA-Z])[0-9a-f]{32,}(?![0-9a-zA-Z])", text)


def test_every_launcher_is_looked_at() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.suffix in (".yaml", ".sh")} == set(COMMANDS)


@pytest.mark.parametrize("name", ["cloud.yaml", "on_premise.yaml"])
def test_cluster_files_fit_the_autoscalers_schema(name: str) -> None:
    config = yaml.safe_load((FOLDER / name).read_text())
    jsonschema.validate(config, RAY_UP)
    for kind in ("head", "worker"):
        starts = [command for command in config[f"{kind}_start_ray_commands"] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0], "whoever reaches the port would run code"
    with pytest.raises(jsonschema.ValidationError, match="nonsense"):
        jsonschema.validate({**config, "nonsense": 1}, RAY_UP)


def test_machines_in_a_cloud_have_an_image_that_fits_and_may_read_the_bucket() -> None:
    """Before: Ray's default image, whose C library is older than torch's wheels need; workers without any rights."""
    config = yaml.safe_load((FOLDER / "cloud.yaml").read_text())
    for node in config["available_node_types"].values():
        assert node["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/")
        assert node["node_config"]["IamInstanceProfile"] == {"Name": "ninefold"}
    assert {config["docker"]["head_image"], config["docker"]["worker_image"]} == {
        f"rayproject/ray:{ray.__version__}-py311", f"rayproject/ray:{ray.__version__}-py311-gpu",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["cloud.yaml", "kuberay.yaml", "rayjob.yaml", "on_premise.yaml", "Dockerfile"])
def test_the_version_of_ray_is_the_one_that_is_tested(name: str) -> None:
    text = (FOLDER / name).read_text()
    named = re.findall(r"rayproject/ray:([\d.]+)-|ray\[[\w,]+\]==([\d.]+)|rayVersion: \"([\d.]+)\"", text)
    assert {version for versions in named for version in versions if version} == {ray.__version__}


def test_a_sweep_on_gpus_says_that_it_wants_them() -> None:
    for name in ("cloud.yaml", "kuberay.yaml", "rayjob.yaml", "on_premise.yaml"):
        assert "--gpus-per-trial 1" in (FOLDER / name).read_text(), name


def test_the_image_has_all_packages_and_nothing_else() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]}
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in pyproject["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert copied == {*packages, "pyproject.toml", "README.md"}
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    extras = re.findall(r"'\.\[(.*)\]'", (FOLDER / "Dockerfile").read_text())[0].split(",")
    assert set(extras) <= pyproject["project"]["optional-dependencies"].keys()


def test_the_runtime_environment_is_one() -> None:
    RuntimeEnv(**yaml.safe_load((FOLDER / "runtime_env.yaml").read_text()))


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The spec of every pod that the object will make."""
    spec = document["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if document["kind"] == "RayCluster" else []
    templates = [group["template"] for group in groups]
    return [template["spec"] for template in [*templates, spec.get("submitterPodTemplate")] if template]


def test_the_kubernetes_files_fit_the_operators_schema() -> None:
    texts = [(FOLDER / name).read_text() for name in ("kuberay.yaml", "rayjob.yaml")]
    documents = [document for text in texts for document in yaml.safe_load_all(text)]
    for document in documents:
        jsonschema.validate(document, kuberay_schema.document(document["kind"]))
    claim, cluster, job = documents
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "RayCluster", "RayJob"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert cluster["spec"]["authOptions"]["mode"] == "token", "whoever reaches the port would run code"
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    RuntimeEnv(**yaml.safe_load(job["spec"]["runtimeEnvYAML"]))
    for pod in [*pods(cluster), *pods(job)]:
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        claims = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert claims <= {claim["metadata"]["name"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys()


@pytest.mark.parametrize(
    "slip",
    [
        lambda spec: spec.pop("headGroupSpec"),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="8"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(volumemounts=[]),
    ],
)
def test_a_slip_in_the_kubernetes_file_is_found(slip: Callable[[dict[str, Any]], Any]) -> None:
    cluster = list(yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text()))[1]
    slip(cluster["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, kuberay_schema.document("RayCluster"))


def test_the_grafana_dashboard_asks_for_every_gauge_that_there_is() -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert set(re.findall(r"ray_(ninefold_\w+)", queries)) == set(GAUGES)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 6


def test_the_ports_of_slurm_jobs_are_their_own_and_nobody_elses() -> None:
    """Before: a job's client port was the next job's dashboard, and both were where outgoing connections are."""
    script = (ROOT / "cluster" / "launch" / "slurm.sh").read_text()
    port = next(line for line in script.splitlines() if line.startswith("port="))
    others = re.findall(r"-port=(\$\(\(.*?\)\))", script)
    assert len(others) == 2
    told = f"for SLURM_JOB_ID in $(seq 1 4000); do {port}; echo $port {' '.join(others)}; done"
    ports = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True).stdout.split()
    assert len(set(ports)) == 3 * 4000
    assert min(map(int, ports)) >= 20_000  # Ray's workers are below
    assert max(map(int, ports)) < 32_768  # Linux's net.ipv4.ip_local_port_range begins there


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A real Slurm of one node on this machine: munged, slurmctld and slurmd; the environment of its commands."""
    assert shutil.which("slurmd"), "Debian's slurm-wlm is not installed; make test-cluster installs it"
    host, folder = socket.gethostname().split(".")[0], tmp_path / "slurm"
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o711)
    for path in (folder, *folder.parents):  # munged refuses a socket that others cannot reach
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o011)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    ports = [free_port(), free_port()]
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge/socket",
        f"--pid-file={folder}/munge/pid", f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed",
    ]  # fmt: skip
    processes = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with open(folder / f"{command[0]}.log", "wb") as log:
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            time.sleep(1)
        end = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h"], env=env, capture_output=True, text=True).stdout:
            assert time.monotonic() < end, "\n".join(path.read_text() for path in folder.glob("*.log"))
            time.sleep(0.5)
        yield env
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            process.wait(30)
