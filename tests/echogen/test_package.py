"""What an installed package holds beside its Python files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = (
    "echogen/py.typed",  # type checkers read the annotations of packages that hold it, no others
    "echogen/engine/cpu/transformer.cpp",
    "echogen/engine/models/tiny/config.json",
    "echogen/kernels/cuda/device.cuh",
    "echogen/kernels/cuda/skinny_linear.cu",
)


def test_what_is_installed_is_whole(tmp_path):
    pytest.importorskip("setuptools", "77")
    tree, out = tmp_path / "tree", tmp_path / "out"
    heavy = shutil.ignore_patterns(".*", "build", "out", "runs", "results", "*.safetensors")
    shutil.copytree(ROOT, tree, ignore=heavy)
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "build_py", "--build-lib", out],
        cwd=tree, capture_output=True, text=True,
    )  # fmt: skip
    assert not built.returncode, built.stderr
    assert not [name for name in NEEDED if not (out / name).is_file()]
    # What a source archive holds: ECHOGEN_BUILD_CUDA=1 builds from one, too.
    archived = (tree / "echogen.egg-info" / "SOURCES.txt").read_text().splitlines()
    assert "CMakeLists.txt" in archived
    for folder in ("kernels", "engine", "train", "bench"):
        for source in (ROOT / folder).rglob("*.py"):
            assert (out / "echogen" / source.relative_to(ROOT)).is_file(), source
