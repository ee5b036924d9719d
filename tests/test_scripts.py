"""The scripts in a checkout whose path contains a space, with stand-ins for the programs they run.

On a machine that it does not support, scripts/install says so before it makes anything.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, checkout)
    return checkout


def run(
    checkout: Path, command: list[str], stand_ins: dict[str, str], **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a script with `stand_ins`, name → shell script, ahead of this machine's programs on PATH."""
    programs = checkout.parent / "bin"
    programs.mkdir(exist_ok=True)
    for name, script in stand_ins.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environ.pop("PYTHON", None)
    return subprocess.run(
        [checkout / "scripts" / command[0], *command[1:]],
        env=environ | variables,
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout.parent,
    )


def venv(checkout: Path, python: str) -> None:
    """A .venv whose Python is a shell script."""
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").write_text(f"#!/bin/sh\n{python}\n")
    (checkout / ".venv/bin/python").chmod(0o755)


def installed(checkout: Path, python: str) -> None:
    """A `venv` in which everything is already installed."""
    venv(checkout, python)
    (checkout / "scripts/install").write_text("#!/bin/sh\n")


def install(checkout: Path, stand_ins: dict[str, str]) -> str:
    """What scripts/install says where it cannot install anything."""
    done = run(checkout, ["install"], stand_ins)
    assert done.returncode == 1, done.stderr
    assert not (checkout / ".venv" / "installed-serve").exists()
    return done.stderr


def test_an_unsupported_system_is_named(checkout: Path) -> None:
    said = install(checkout, {"uname": "echo Darwin", "sha256sum": "exit 127"})
    assert said == "[install] needs Linux, but this is Darwin: use a Linux container or virtual machine.\n"


def test_a_python_that_is_too_old_is_named(checkout: Path) -> None:
    said = install(checkout, {"python3": "exit 1"})
    assert said.startswith("[install] python3 is not Python 3.11 to 3.14")


def test_a_venv_of_such_a_python_is_left_alone(checkout: Path) -> None:
    venv(checkout, '[ "$2" = pip ]')
    said = install(checkout, {})
    assert said == "[install] .venv is not Python 3.11 to 3.14; remove it and run this again.\n"


def test_without_the_venv_module_the_package_is_named(checkout: Path) -> None:
    said = install(checkout, {"python3": 'case "$2" in venv) exit 1;; esac'})
    assert said.endswith("[install] cannot make .venv; on Debian or Ubuntu: apt-get install python3-venv\n")


@pytest.mark.parametrize(("what", "files"), [("serve", "cpu demo"), ("dev", "cpu dev demo")])
def test_what_is_asked_for_is_installed_and_compiled_once(checkout: Path, what: str, files: str) -> None:
    stand_ins = {
        "made": f'echo "$@" >> "{checkout}/said"',
        "python3": f'case "$2" in venv) mkdir -p .venv/bin && cp "{checkout.parent}/bin/made" .venv/bin/python;; esac',
    }
    done = run(checkout, ["install", what], stand_ins)
    assert done.returncode == 0, done.stderr
    said = (checkout / "said").read_text()
    assert re.findall(r"-r requirements-(.*)\.txt", said) == files.split()
    assert said.count("import") == 1 + 1, "Python's version is checked, then kernels are compiled"
    for held in (what, "serve"):
        again = run(checkout, ["install", held], {})
        assert again.stderr == "" and (checkout / "said").read_text() == said


# A compiler that checks that its inputs exist, and makes programs that print their arguments.
COMPILER = """
case $1 in -print-file-name=*) exit ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    -o) printf '#!/bin/sh\\necho ran "$@"\\n' > "$2" && chmod +x "$2" && shift ;;
    -I) [ -d "$2" ] && shift || exit 1 ;;
    -include) shift ;;
    -*) ;;
    *) [ -e "$1" ] || { echo "no file $1" >&2; exit 1; } ;;
  esac
  shift
done
"""


def test_the_sanitizers_programs_are_built_and_run(checkout: Path) -> None:
    for folder in ("starling/model/ops/cpu/native", "tests/native"):
        shutil.copytree(ROOT / folder, checkout / folder)
    stand_ins = {"c++": COMPILER, "python3": ":", "uname": "echo x86_64"}
    done = run(checkout, ["sanitize"], stand_ins)
    assert done.returncode == 0, done.stderr
    sets = ["amx", "avx512vnni", "avx512", "avxvnni", "avx2", "portable", "amx-emulated"]
    assert done.stdout.splitlines() == [f"ran {name}" for name in sets] * 2


def test_the_image_script_removes_no_folder_that_it_did_not_make(checkout: Path) -> None:
    installed(checkout, "exit 1")
    work = checkout.parent / "work"
    (work / "rootfs").mkdir(parents=True)
    (work / "mine").write_text("")
    refused = run(checkout, ["image"], {"buildah": ":"}, WORK="work")  # relative to the caller's folder
    assert refused.returncode == 1 and "needs Python 3.11" in refused.stderr
    assert {path.name for path in work.iterdir()} == {"mine", "rootfs", "starling-image"}


@pytest.mark.parametrize("failing", ["", "test_b", "bench.gpu", "test_b*|*bench.gpu"])
def test_a_failing_gpu_test_stops_nothing_and_is_remembered(checkout: Path, failing: str) -> None:
    (checkout / "tests").mkdir()
    for name in "abc":
        (checkout / f"tests/test_{name}.py").write_text("@pytest.mark.gpu")
    shutil.copy(__file__, checkout / "tests")  # mentions the mark but has no such test, which pytest calls a failure
    installed(checkout, f'echo "$@" >> said; case "$*" in *{failing or "nothing"}*) exit 1;; esac')
    done = run(checkout, ["gpu", "--option"], {})
    assert done.returncode == (1 if failing else 0)
    assert ("tests/test_b.py" in done.stderr) == ("test_b" in failing)
    said = (checkout / "said").read_text().splitlines()
    assert len(said) == 1 + 3 + 1 and said[-1] == "-m bench.gpu --option"


def test_paths_of_weights_are_relative_to_the_caller(checkout: Path) -> None:
    installed(checkout, 'echo "$STARLING_WEIGHTS|$STARLING_WEIGHTS_SOURCE"')
    here = checkout.parent
    (here / "mirror").mkdir()
    done = run(checkout, ["serve"], {}, STARLING_WEIGHTS="mine", STARLING_WEIGHTS_SOURCE="mirror")
    assert done.stdout == f"{here}/mine|{here}/mirror\n"
    for source in ("https://mirror.example/a", "absent"):
        done = run(checkout, ["serve"], {}, STARLING_WEIGHTS_SOURCE=source)
        assert done.stdout == f"|{source}\n"


@pytest.mark.parametrize("name", ["check", "demo", "gpu", "image", "install", "serve", "test"])
def test_a_script_finds_its_checkout_despite_cdpath(checkout: Path, name: str) -> None:
    """`cd` searches CDPATH first for a path that does not start with a dot."""
    other = checkout.parent / "other/scripts"
    other.mkdir(parents=True)
    (other / "install").write_text("#!/bin/sh\necho another checkout\n")
    (other / "install").chmod(0o755)
    venv(checkout, "exit 1")
    if name != "install":
        (checkout / "scripts/install").write_text("#!/bin/sh\necho its own\nexit 1\n")
    environ = {**os.environ, "CDPATH": str(other.parent), "PYTHON": "false"}
    done = subprocess.run([f"scripts/{name}"], env=environ, cwd=checkout, capture_output=True, text=True, check=False)
    assert "another checkout" not in done.stdout + done.stderr and str(other) not in done.stdout
    assert done.returncode == 1


def test_no_script_runs_a_program_that_contains_the_path_of_venv() -> None:
    """pip writes the path of .venv into the first line of each program, which breaks once the checkout is moved."""
    for script in (path for path in (ROOT / "scripts").iterdir() if path.is_file()):
        assert set(re.findall(r"\.venv/bin/\w+", script.read_text())) <= {".venv/bin/python"}, script.name
