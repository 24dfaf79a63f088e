"""Dockerfile, conda's environment and the Kubernetes examples: what can be seen without a daemon.

No image was built and no cluster was at hand. The wheel is built from what the Dockerfile copies.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import typer
import yaml
from conftest import ROOT
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from telescope import cli

KUBERNETES = ROOT / "examples" / "kubernetes"
RAYJOB_KEYS = {
    # KubeRay's API reference, ray.io/v1
    "spec": {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"},
    "rayClusterSpec": {"rayVersion", "headGroupSpec", "workerGroupSpecs"},
    "headGroupSpec": {"rayStartParams", "template"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas"}
    | {"rayStartParams", "template"},
}
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]


def instructions(kind: str) -> list[str]:
    """The values of the Dockerfile's instructions of a kind."""
    parser = DockerfileParser(path=str(ROOT / "Dockerfile"))
    return [one["value"] for one in parser.structure if one["instruction"] == kind]


def copied() -> list[str]:
    """The paths that the Dockerfile copies out of the tree."""
    words = [shlex.split(value) for value in instructions("COPY")]
    return [name for *names, _ in words if not names[0].startswith("--from") for name in names]


def is_sent(path: str) -> bool:
    """Tell whether .dockerignore lets a path of the top folder through: the last match decides."""
    sent = True
    for line in IGNORED:
        if fnmatch.fnmatch(path, line.removeprefix("!")):
            sent = line.startswith("!")
    return sent


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def python_required() -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return SpecifierSet(project["requires-python"])


def test_the_wheel_builds_from_what_the_dockerfile_copies(tmp_path: Path) -> None:
    assert len(copied()) >= 7
    tree = tmp_path / "src"
    tree.mkdir()
    for name in copied():
        assert is_sent(name), f".dockerignore keeps {name} back"
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name)
        else:
            shutil.copyfile(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path)]
    done = subprocess.run([*build, str(tree)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.whl"))) == 1
    assert not is_sent("results")
    assert not is_sent(".git")


def test_the_image_is_pinned_and_runs_as_nobody_special() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (base,) = (value for value in instructions("ARG") if value.startswith("BASE="))
    version = re.fullmatch(r"BASE=python:(3\.\d+)-slim", base)
    assert version is not None, "a plain name, without a registry"
    assert version[1] in python_required()
    assert {value.split()[0] for value in instructions("FROM")} == {"${BASE}"}
    assert instructions("USER") == ["telescope"]
    assert instructions("ENTRYPOINT") == ['["telescope"]']
    assert "--constraint constraints.txt" in text
    stages = [value for value in instructions("COPY") if value.startswith("--from=")]
    assert all(f" AS {stage[7:].split()[0]}" in text for stage in stages)


def test_condas_environment_agrees_with_the_project() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert python.removeprefix("python=") in python_required()
    option, install = pip["pip"]
    assert (ROOT / option.removeprefix("--constraint ")).is_file()
    extras = Requirement(f"telescope-mup{install.removeprefix('.')}").extras
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras <= project["optional-dependencies"].keys()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def everything(value: Any) -> list[tuple[str, Any]]:
    """All keys and values at any depth."""
    if isinstance(value, dict):
        return [*value.items(), *(pair for inner in value.values() for pair in everything(inner))]
    return (
        [pair for inner in value for pair in everything(inner)] if isinstance(value, list) else []
    )


def commands() -> list[list[str]]:
    """The arguments of `telescope` in the examples."""
    found = [value for key, value in everything(documents("workers.yaml")) if key == "args"]
    entry = shlex.split(documents("rayjob.yaml")[0]["spec"]["entrypoint"])
    assert entry[0] == "telescope"
    return [*found, entry[1:]]


def test_the_examples_commands_are_telescopes() -> None:
    app = cast(Any, typer.main.get_command(cli.app))
    assert [verb for verb, *_ in commands()] == ["run", "worker", "run"]
    driver, worker, _ = (
        app.commands[verb].make_context(verb, list(rest)).params for verb, *rest in commands()
    )
    assert driver["dispatcher"] == "workers"
    assert driver["storage"] == worker["storage"]
    assert ":" not in driver["storage"].split("://")[1].split("@")[0], "no password"


def test_what_the_examples_name_is_in_them() -> None:
    found = documents("workers.yaml")
    named = {
        one["kind"]: {two["metadata"]["name"] for two in found if two["kind"] == one["kind"]}
        for one in found
    }
    jobs = {one["metadata"]["name"]: one["spec"] for one in found if one["kind"] == "Job"}
    workers = next(word for word in commands()[0] if word.startswith("--workers="))
    assert jobs["telescope-workers"]["parallelism"] == int(workers.partition("=")[2])
    for name, job in jobs.items():
        pod = job["template"]["spec"]
        assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] in {
            container["name"] for container in pod["containers"]
        }, name
    pairs = everything([*found, *documents("rayjob.yaml")])
    assert {value for key, value in pairs if key == "claimName"} <= named["PersistentVolumeClaim"]
    secrets = {value["name"] for key, value in pairs if key == "secretKeyRef"}
    assert all(
        f"secret generic {name} " in (KUBERNETES / "workers.yaml").read_text() for name in secrets
    )
    host = commands()[0][3].split("@")[1].split("/")[0]
    assert host in named["Service"]
    for name, job in jobs.items():
        # All is applied at once, and a database that is not there ends a command with code 2.
        (waits,) = job["template"]["spec"]["initContainers"]
        assert f"until pg_isready --host={host};" in waits["command"][-1], name


def test_a_rayjob_has_kuberays_keys_and_our_ray() -> None:
    (job,) = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec.keys() == RAYJOB_KEYS["spec"]
    assert cluster.keys() == RAYJOB_KEYS["rayClusterSpec"]
    assert cluster["headGroupSpec"].keys() == RAYJOB_KEYS["headGroupSpec"]
    assert [group.keys() for group in cluster["workerGroupSpecs"]] == [
        RAYJOB_KEYS["workerGroupSpecs"]
    ]
    assert cluster["rayVersion"] == constraints()["ray"]
    (group,) = cluster["workerGroupSpecs"]
    assert f"--workers {group['replicas']}" in job["spec"]["entrypoint"]


@pytest.mark.formats
def test_the_examples_keep_to_kubernetes_schema() -> None:
    """Of a RayJob, the pods: KubeRay's own schema is in no package."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for document in documents("workers.yaml"):
        kubernetes.validate(document, "1.33", strict=True)
    templates = [value for key, value in everything(documents("rayjob.yaml")) if key == "template"]
    assert len(templates) == 2
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **template}
        kubernetes.validate(pod, "1.33", strict=True)
