"""The requirements: every package pinned, the files in agreement, and each package's reason in pyproject.toml."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
BROUGHT = "# What those bring along"
OF_CUDA = ("cuda-", "nvidia-", "triton")  # dependencies of torch for CUDA, which pins their versions itself


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(re.split("==", line, maxsplit=1) for line in lines if "==" in line)  # type: ignore[misc]


def named(name: str) -> set[str]:
    """What a file asks for, without the dependencies of that."""
    ours, _, _ = (ROOT / name).read_text().partition(BROUGHT)
    return set(re.findall(r"^(.*)==", ours, re.M))


def brought(name: str, found: set[str]) -> set[str]:
    """Adds to `found` the direct and indirect dependencies of `name`, except those that a package pins itself."""
    for text in requires(name) or []:
        needed = Requirement(text)
        pinned = any(each.operator == "==" and "*" not in each.version for each in needed.specifier)
        wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if wanted and not needed.name.startswith(OF_CUDA) and canonicalize_name(needed.name) not in found:
            found |= set() if pinned else {canonicalize_name(needed.name)}
            brought(needed.name, found)
    return found


def test_the_image_and_the_cpu_install_agree() -> None:
    image, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    del image["torch"], cpu["torch"]
    assert image.items() <= cpu.items()


def test_pyproject_names_what_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(project["dependencies"]) == named("requirements.txt")
    assert {*project["dependencies"], *extras["cli"]} == named("requirements-cpu.txt")
    assert set(extras["demo"]) == named("requirements-demo.txt")
    assert set(extras["replicas"]) == named("requirements-replicas.txt")
    assert set(extras["dev"]) == named("requirements-dev.txt")


def test_every_requirement_is_pinned() -> None:
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            pinned = re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.+]+", line)
            assert not line or line.startswith("#") or pinned, f"{path.name}: {line}"


def test_the_oldest_supported_python_can_install_every_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=").partition(",")[0]
    for path in ROOT.glob("requirements*.txt"):
        for name in pins(path.name):
            try:
                wanted = metadata(name.partition("[")[0]).get("Requires-Python", "")
            except PackageNotFoundError:
                continue  # a requirement of the reference or the replicas
            assert SpecifierSet(wanted).contains(f"{oldest}.0"), f"{name} needs Python {wanted}"


def test_the_reference_has_the_same_pins_as_the_tests() -> None:
    reference, dev = pins("requirements-reference.txt"), pins("requirements-dev.txt")
    assert {name: reference[name] for name in ("accelerate", "transformers")}.items() <= dev.items()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-cpu.txt"])
def test_dependencies_of_the_named_packages_are_pinned_too(name: str) -> None:
    pinned = {canonicalize_name(package) for package in pins(name)}
    asked = {canonicalize_name(package) for package in named(name)}
    needed = set().union(*(brought(package, set()) for package in asked))
    assert pinned == asked | needed


def test_the_pins_are_what_is_tested() -> None:
    for package, wanted in pins("requirements-cpu.txt").items():
        assert package == "torch" or version(package) == wanted  # torch's version depends on the build
