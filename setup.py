"""Maps the top-level folders onto the import package (the rest of the metadata: pyproject.toml),
and builds the CUDA C++ operators along with it where ECHOGEN_BUILD_CUDA=1 asks for that."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDERS = ("kernels", "engine", "train", "bench")


def packages() -> dict[str, str]:
    """Import name → folder, for every folder of the repository that holds Python files."""
    found = {"echogen": "echogen", "echogen.commands": "echogen/commands"}
    for top in FOLDERS:
        for folder in [ROOT / top, *sorted(p for p in (ROOT / top).rglob("*") if p.is_dir())]:
            if any(folder.glob("*.py")) or folder == ROOT / top:
                path = folder.relative_to(ROOT)
                found["echogen." + ".".join(path.parts)] = path.as_posix()
    return found


class BuildPy(build_py):
    """Python files and, on request, the fatbins beside the CUDA sources."""

    def run(self) -> None:
        wanted = os.environ.get("ECHOGEN_BUILD_CUDA", "0")
        if wanted not in ("0", "1"):
            raise SystemExit(f"ECHOGEN_BUILD_CUDA={wanted}: write 1 to build the CUDA operators")
        if wanted == "1":
            build_cuda()
        super().run()


def build_cuda() -> None:
    """Build kernels/cuda/*.fatbin with CMake. Raises SystemExit if that fails: in an editable
    install setuptools would swallow any other error, and install without them."""
    if shutil.which("cmake") is None:
        raise SystemExit("ECHOGEN_BUILD_CUDA=1 needs cmake on PATH (pip install cmake)")
    folder = ROOT / "build" / "cuda"
    # -U: a build for one GPU alone (bench/gpu.sh) is not remembered.
    configure = ["-U", "ECHOGEN_CUDA_ARCHITECTURES", "-S", ROOT, "-B", folder]
    for arguments in ([*configure, "-DECHOGEN_REQUIRE_CUDA=ON"], ["--build", folder]):
        if subprocess.run(["cmake", *arguments]).returncode:
            raise SystemExit("ECHOGEN_BUILD_CUDA=1: CMake failed; what it said stands above")


setup(
    packages=list(packages()),
    package_dir=packages(),
    include_package_data=False,  # what is named below goes in; folders of data are no packages
    package_data={
        "echogen.engine": ["models/*/*", "cpu/*.cpp"],
        "echogen.kernels": ["cuda/*.cu", "cuda/*.cuh", "cuda/*.fatbin*"],
    },
    cmdclass={"build_py": BuildPy},
)
