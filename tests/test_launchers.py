"""The launchers: what shells and YAML make of them, and that their commands exist."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "scripts" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
BASH = shutil.which("bash") or "bash"
ALL = sorted(path for path in FOLDER.iterdir() if path.is_file())


def test_there_is_one_for_each_kind_of_cluster():
    assert [path.name for path in ALL] == ["gke_jobset.yaml", "gpus.sh", "slurm.sh", "tpu_vm.sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_understands_it(path: Path):
    done = subprocess.run([BASH, "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_mode & 0o111, f"{path.name} is to be run"
    alone = subprocess.run([BASH, str(path)], capture_output=True, text=True, env={})
    assert alone.returncode == 2 and "usage: " in alone.stderr and "CONFIG" in alone.stderr


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_its_head_says_how_to_use_it(path: Path):
    lines = path.read_text().splitlines()
    head = [line for line in lines[: len(lines) // 2] if line.startswith("#")]
    assert any("   " in line and path.name in line for line in head), "the command"
    assert len(lines) <= 60


def test_one_machine_with_gpus_hands_everything_on(tmp_path: Path):
    fake = tmp_path / "distill-jax"
    fake.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $JAX_PLATFORMS $*"\n')
    fake.chmod(0o755)
    words = [BASH, str(FOLDER / "gpus.sh"), "a b.yaml", "seed=3"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={"PATH": str(tmp_path), "GPUS": "0,2"}
    )
    assert done.stdout == "0,2 cuda run a b.yaml seed=3\n"


def test_the_job_set_asks_for_whole_slices():
    job = yaml.safe_load((FOLDER / "gke_jobset.yaml").read_text())
    assert job["kind"] == "JobSet" and job["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    (group,) = job["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["distill-jax", "run"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert spec["completions"] == spec["parallelism"] == int(shape[0]) * int(shape[1]) // chips
