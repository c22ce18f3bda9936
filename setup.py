"""Maps the top-level folders onto the import package (the rest of the metadata: pyproject.toml)."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = ("kernels", "engine", "train", "bench")


def packages() -> dict[str, str]:
    """Import name → folder, for every folder of the house that holds Python files."""
    found = {"echogen": "echogen", "echogen.commands": "echogen/commands"}
    for top in FOLDERS:
        for folder in [ROOT / top, *sorted(p for p in (ROOT / top).rglob("*") if p.is_dir())]:
            if any(folder.glob("*.py")) or folder == ROOT / top:
                path = folder.relative_to(ROOT)
                found["echogen." + ".".join(path.parts)] = path.as_posix()
    return found


setup(
    packages=list(packages()),
    package_dir=packages(),
    package_data={"echogen.engine": ["models/*/*"], "echogen.kernels": ["cuda/*.cu", "cuda/*.cuh"]},
)
