"""Runs Python on an emulated GPU, under torch's own CUDA build: `scripts/emulated-gpu -- -m pytest -m gpu FILE`.

torch, unchanged, calls the runtime in runtime.cpp instead of NVIDIA's; our kernels run as in emulator.py, and torch's
on the host (sitecustomize.py). It tells whether streams, events, captures, pinned memory and allocations are used in
ways that torch and CUDA allow, and how much memory they take: not how fast anything is on a GPU.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from starling.model.ops.cuda import nvrtc
from tests.cuda.emulator import build, compiled

HERE = Path(__file__).parent
DRIVER = HERE.with_name("emulated_driver.cpp")
TORCH = Path(torch.__file__).parent / "lib"
RUNTIME = "libcudart.so.13"
HEADERS = Path(torch.__file__).parents[1] / "nvidia/cu13/include"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/emulated-gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--architecture", type=int, choices=(86, 90), default=86, help="compute capability")
    parser.add_argument("--memory-gb", type=float, default=6.0)
    parser.add_argument("--processors", type=int, default=6, help="multiprocessors; few, so that there is less to run")
    parser.add_argument("--eagerness", type=int, default=10, help="percent of calls at which the device does some work")
    parser.add_argument("--lost-after", type=int, default=-1, help="replays of graphs until the device is lost")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of when it works")
    parser.add_argument("--no-kernels", action="store_true", help="none does anything, torch's own included")
    parser.add_argument("command", nargs="+", help="for Python; it follows --")
    options = parser.parse_args()
    if torch.version.cuda is None or not torch.version.cuda.startswith("13."):
        parser.error(f"torch {torch.__version__} is not built for CUDA 13; scripts/emulated-gpu installs one that is")
    with tempfile.TemporaryDirectory(prefix="emulated-gpu-") as name:
        folder = Path(name)
        settings = {
            "KERNELS": list_kernels(folder, options.architecture),
            "ARCHITECTURE": options.architecture,
            "MEMORY_BYTES": int(options.memory_gb * 1e9),
            "PROCESSORS": options.processors,
            "EAGERNESS": options.eagerness,
            "LOST_AFTER": options.lost_after,
            "SEED": options.seed,
            "NO_KERNELS": int(options.no_kernels),
        }
        print(f"emulated GPU: compute capability {options.architecture / 10}, seed {options.seed}", file=sys.stderr)
        environment = os.environ | {
            "LD_PRELOAD": str(build_runtime(folder)),
            "LD_LIBRARY_PATH": str(folder),
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **{f"EMULATED_GPU_{name}": str(value) for name, value in settings.items()},
        }
        sys.exit(subprocess.run([sys.executable, *options.command], env=environment, check=False).returncode)


def build_runtime(folder: Path) -> Path:
    """libcudart and, by another name, libcuda."""
    source = HERE / "runtime.cpp"
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *TORCH.glob("libtorch*.so"), *TORCH.glob("libc10*.so")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = source.read_text(encoding="utf-8")
    wanted = set(re.findall(rf"(\w+)@{RUNTIME}", listed.stdout))
    rest = sorted(name for name in wanted if not re.search(rf"\b{name}\(", text))
    flags = (
        f"-I{HEADERS}", f"-DREST={' '.join(f'NOT_EMULATED({name})' for name in rest)}", f"-Wl,-soname,{RUNTIME}",
        f"-Wl,--version-script={HERE / 'versions.map'}",
    )  # fmt: skip
    library = compiled("runtime", source, key=DRIVER.read_bytes(), flags=flags)
    for name in (RUNTIME, "libcuda.so.1"):
        (folder / name).symlink_to(library)
    return folder / RUNTIME


def list_kernels(folder: Path, architecture: int) -> Path:
    lines = []
    for source in sorted(nvrtc.NATIVE.glob("*.cu")):
        code = folder / f"{source.stem}.cubin"
        code.write_bytes(nvrtc.cubin(source.stem, architecture))
        lines.append(f"{code} {build(source, architecture)}\n")
    path = folder / "kernels"
    path.write_text("".join(lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
