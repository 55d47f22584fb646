"""The launch scripts, as far as they can be tried without a cluster: what they would run."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jaxgrpo.config import ClusterConfig, check_ranges
from jaxgrpo.config_file import parse_args
from jaxgrpo.sharding import FSDP
from jaxgrpo.task import check_batch

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "scripts" / "launch"


def config_of(script, tmp_path, **env):
    """Runs a shell script where Python and srun only write down what they are asked."""
    fake = tmp_path / ".venv" / "bin"
    fake.mkdir(parents=True)
    for name in ("python", "srun"):
        (fake / name).write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$ASKED"\n')
        (fake / name).chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    asked = tmp_path / "asked"
    path = f"{fake}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-c", script],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "ASKED": str(asked), **env},
    )
    words = asked.read_text().splitlines()
    arguments = words[words.index("jaxgrpo.train") + 1 :]
    arguments[0] = str(tmp_path / arguments[0])
    config = parse_args(arguments)
    check_ranges(config)
    return config


def check(config, nodes):
    """It fits eight GPUs of so many nodes, two problems each, and resumes where it was."""
    check_batch(config, SimpleNamespace(shape={"fsdp": 8 * nodes, "tp": 1}), FSDP)
    assert (config.mesh.fsdp, config.mesh.tp) == (-1, 1)
    assert config.rollout.problems == 2 * 8 * nodes
    assert not config.run.fresh
    assert config.model.path.endswith("/Qwen3-8B")


@pytest.mark.parametrize("nodes", [1, 4])
def test_slurm(nodes, tmp_path):
    script = (LAUNCH / "slurm.sbatch").read_text()
    asked = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--ntasks-per-node=1", "--gpus-per-node=8", "--requeue"} <= set(asked)
    config = config_of(script, tmp_path, SLURM_JOB_NUM_NODES=str(nodes))
    check(config, nodes)
    # Which process this is comes from srun's variables.
    assert config.cluster == ClusterConfig(timeout=config.cluster.timeout)


@pytest.mark.parametrize("nodes", [1, 4])
def test_skypilot(nodes, tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["accelerators"] == "H200:8"
    assert task["envs"]["RUN_DIR"].startswith(next(iter(task["volumes"])) + "/")
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    ips = [f"10.0.0.{i}" for i in range(1, nodes + 1)]
    config = config_of(
        task["run"],
        tmp_path,
        SKYPILOT_NUM_NODES=str(nodes),
        SKYPILOT_NODE_RANK=str(nodes - 1),
        SKYPILOT_NODE_IPS="\n".join(ips),
        **task["envs"],
    )
    check(config, nodes)
    where = (config.cluster.coordinator, config.cluster.processes, config.cluster.process)
    assert where == (("", 1, -1) if nodes == 1 else ("10.0.0.1:47500", 4, 3))


@pytest.mark.parametrize("nodes", [1, 4])
def test_jobset(nodes, tmp_path):
    jobset = yaml.safe_load((LAUNCH / f"jobset_{nodes}x8.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["completionMode"], job["parallelism"], job["completions"]) == (
        "Indexed",
        nodes,
        nodes,
    )
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a failure policy of pods asks for it
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]
    assert container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    env = {each["name"]: each["value"] for each in container["env"]}
    config = config_of(script, tmp_path, JOB_COMPLETION_INDEX=str(nodes - 1), **env)
    check(config, nodes)
    where = (config.cluster.coordinator, config.cluster.processes, config.cluster.process)
    # A pod's name: JobSet, job, its number, the pod's; under the JobSet's own service.
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    assert where == (("", 1, -1) if nodes == 1 else (f"{name}:47500", 4, 3))
    assert config.run.dir.startswith("/shared/")
