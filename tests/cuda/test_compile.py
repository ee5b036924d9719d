"""Every kernel compiles, without a GPU, for the GPUs that it is meant for; nothing spills."""

import importlib.metadata
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from starling.__main__ import main
from starling.errors import DeviceError
from starling.model.ops.cpu.compiler import find_compiler
from starling.model.ops.cuda import nvrtc
from tests.cuda.emulator import KERNEL
from tests.cuda.ptx import kernels_of, ptx_of
from tests.waiting import HANG_S

USED = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+)", re.S
)


@pytest.mark.parametrize("arch", nvrtc.ARCHS)
@pytest.mark.parametrize("source", nvrtc.SOURCES)
def test_compiles_without_spills(source: str, arch: int) -> None:
    code, report = nvrtc.compile_source(source, arch)
    assert code.startswith(b"\x7fELF")
    kernels = {name: (int(stores), int(loads), int(used)) for name, stores, loads, used in USED.findall(report)}
    wanted = set(KERNEL.findall((nvrtc.NATIVE / f"{source}.cu").read_text(encoding="utf-8")))
    assert set(kernels) == wanted
    for name, (stores, loads, _) in kernels.items():
        assert stores == loads == 0, f"{name} spills registers on sm_{arch}"


@pytest.mark.parametrize("source", nvrtc.SOURCES)
def test_kernels_that_may_begin_early_wait_for_the_previous_one(source: str) -> None:
    kernels = kernels_of(source, 90)
    assert kernels
    for kernel in kernels:
        ahead, waits, _ = kernel.partition("griddepcontrol.wait;")
        assert waits
        # Copies of weights to shared memory, and nothing else: a plain load may return stale data, and a store may
        # overwrite what is still being read.
        assert not re.findall(r"^\s*(?:@\S+\s+)?((?:ld|st)\.global\S*|(?:atom|red)\.\S*)", ahead, re.M)
    assert "griddepcontrol" not in ptx_of(source, 86)


@pytest.mark.parametrize("source", nvrtc.SOURCES)
def test_the_compiler_joins_no_product_and_sum_that_are_rounded_apart(source: str) -> None:
    ptx = ptx_of(source, 90)
    # "An add instruction with no rounding modifier [...] may be optimized aggressively by the code optimizer. In
    # particular, mul/add sequences with no rounding modifiers may be optimized to use fused-multiply-add": PTX ISA.
    assert not re.findall(r"\b(?:add|sub|mul)\.(?:ftz\.)?f(?:16|32|64)\S*", ptx)


@pytest.mark.parametrize("source", ["elementwise", "norm", "rotary"])
def test_rows_are_read_and_written_8_or_16_bytes_at_a_time(source: str) -> None:
    for kernel in kernels_of(source, 86):
        used = set(re.findall(r"(?:ld|st)\.global\.\S+", kernel))
        assert used - {"ld.global.u32", "ld.global.s32"} <= {  # ids, slots, positions
            "ld.global.v2.u32", "ld.global.v4.u32", "ld.global.v4.f32",
            "st.global.v2.u32", "st.global.v4.u32", "st.global.v4.f32",
        }, kernel.split("(")[0]  # fmt: skip


def test_the_cache_keeps_what_was_compiled_by_this_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = nvrtc.SOURCES[0]
    made = nvrtc.cubin(source, 86, tmp_path)
    monkeypatch.setattr(nvrtc, "compile_source", lambda source, arch: (b"of another compiler", ""))
    assert nvrtc.cubin(source, 86, tmp_path) == made
    monkeypatch.setattr(nvrtc, "version", lambda: "999.0")
    assert nvrtc.cubin(source, 86, tmp_path) == b"of another compiler"


def test_kernels_are_compiled_while_the_caller_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone_on = threading.Event()

    def compile_source(source: str, arch: int) -> tuple[bytes, str]:
        assert gone_on.wait(HANG_S)
        if source == "head":
            raise DeviceError(f"{source}.cu does not compile")
        return f"{source} for {arch}".encode(), ""

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    compiling = nvrtc.compiling(86, tmp_path)
    gone_on.set()
    assert compiling["norm"].result() == b"norm for 86"
    with pytest.raises(DeviceError, match=r"head\.cu does not compile"):
        compiling["head"].result()
    assert compiling.keys() == set(nvrtc.SOURCES)


def test_whatever_changes_the_machine_code_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, source, compiled = tmp_path / "native", nvrtc.SOURCES[0], []

    def compile_source(source: str, arch: int) -> tuple[bytes, str]:
        compiled.append(source)
        return b"machine code", ""

    def edit(name: str) -> None:
        (native / name).write_text((native / name).read_text(encoding="utf-8") + "// another\n", encoding="utf-8")

    shutil.copytree(nvrtc.NATIVE, native)
    monkeypatch.setattr(nvrtc, "NATIVE", native)
    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    for change, arch in (
        (lambda: None, 86),
        (lambda: None, 89),
        (lambda: edit(f"{source}.cu"), 86),
        (lambda: edit("device.h"), 86),
        (lambda: monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--use_fast_math")), 86),
    ):
        change()
        compiled.clear()
        for _ in range(2):
            nvrtc.cubin(source, arch, tmp_path / "cache")
        assert compiled == [source]


def test_code_that_does_not_compile_is_reported_in_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.cu").write_text("int f() { return absent; }\n")
    monkeypatch.setattr(nvrtc, "NATIVE", tmp_path)
    with pytest.raises(DeviceError, match=r'(?s)^wrong\.cu does not compile for sm_86: .*"absent" is undefined'):
        nvrtc.compile_source("wrong", 86)


def test_without_a_compiler_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(nvrtc, "LIBRARIES", ("libnvrtc-of-nobody.so",))
    nvrtc._library.cache_clear()
    try:
        with pytest.raises(DeviceError, match=r"libnvrtc\) was not found.*pip install nvidia-cuda-nvrtc"):
            nvrtc.version()
    finally:
        nvrtc._library.cache_clear()


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder instead of those in which pip installs NVIDIA's packages."""
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    nvrtc._library.cache_clear()
    yield tmp_path
    nvrtc._library.cache_clear()


@pytest.mark.parametrize(("cuda", "chosen"), [("98.8", "cuda_nvrtc"), ("99.0", "cu99")])
def test_of_several_compilers_the_one_of_torchs_cuda_is_chosen(
    bundled: Path, monkeypatch: pytest.MonkeyPatch, cuda: str, chosen: str
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    shared_library(bundled / "cu99" / "lib" / "libnvrtc.so.99", "")  # the packages' layout since CUDA 13
    shared_library(bundled / "cuda_nvrtc" / "lib" / "libnvrtc.so.98", "")
    assert Path(nvrtc._library()._name).parts[-3] == chosen


def test_a_compiler_that_does_not_know_where_it_lies_finds_its_builtins(
    bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", "99.0")
    shared_library(
        bundled / "cu99" / "lib" / "libnvrtc.so.99",
        """#include <dlfcn.h>
        extern "C" int nvrtcVersion(int* major, int* minor) {
          return *major = 99, *minor = 0, dlopen("libnvrtc-builtins.so.99.0", RTLD_LAZY) ? 0 : 7;
        }
        extern "C" const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE"; }""",
    )
    shared_library(bundled / "cu99" / "lib" / "libnvrtc-builtins.so.99.0", "")
    assert nvrtc.version() == "99.0"


def shared_library(path: Path, text: str) -> None:
    compiler = find_compiler()
    assert compiler is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [*compiler, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=text, text=True, check=True)


def test_the_compilers_version_is_its_packages() -> None:
    installed = [d.version for d in importlib.metadata.distributions() if d.name.startswith("nvidia-cuda-nvrtc")]
    assert any(found.startswith(f"{nvrtc.version()}.") for found in installed)


def test_an_image_is_prepared_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STARLING_DEVICE", "cuda")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where this user may have compiled some
    monkeypatch.setattr(nvrtc, "SOURCES", ("elementwise",))
    assert main(["prepare"]) == 0
    assert "compiled for sm_80, sm_86, sm_89, sm_90" in capsys.readouterr().out
    made = sorted(path.name for path in (tmp_path / ".cache" / "starling").glob("*.cubin"))
    assert [name.split("-")[3] for name in made] == ["sm80", "sm86", "sm89", "sm90"]


def test_a_gpu_too_new_for_the_compiler_gets_ptx_and_one_too_old_an_error() -> None:
    source = nvrtc.SOURCES[0]
    assert b".target sm_" in nvrtc.compile_source(source, 999)[0]
    with pytest.raises(DeviceError, match="sm_20"):
        nvrtc.compile_source(source, 20)
