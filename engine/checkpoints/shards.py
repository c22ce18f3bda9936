"""Opens a checkpoint's files without reading their tensors, and replaces either all or none."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from echogen.engine.checkpoints.keymap import CheckpointError
from echogen.engine.decoding.parts import in_parts

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_STAGING, _COMMITTED, _MANIFEST = ".saving", ".saved", "manifest.json"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Shard:
    """One open weights file: the shapes and kinds of its tensors, and how to get one of them."""

    path: Path
    shapes: dict[str, Tensor]  # on the meta device
    get: Callable[[str], Tensor]


def open_weights(folder: Path) -> list[Shard]:
    """Open the weights of a folder: one file, or every shard that an index names.

    Raises:
        CheckpointError: there are none, one is damaged, or index and shards disagree on a key.
    """
    for single, opener in ((_SINGLE, _open_safetensors), ("pytorch_model.bin", _open_pickle)):
        if (folder / single).exists():
            return [opener(folder / single)]
        index = folder / f"{single}.index.json"
        if index.exists():
            return _open_indexed(index, opener)
    raise CheckpointError(
        f"{folder}: no weights; put {_SINGLE}, {_INDEX} or pytorch_model.bin beside config.json"
    )


def _open_indexed(index: Path, opener: Callable[[Path], Shard]) -> list[Shard]:
    keys_of: dict[str, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; download the index again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise CheckpointError(
                f"{index}: {key} is in {name!r}; it must be a file of this folder"
            )
        keys_of.setdefault(name, set()).add(key)
    shards = []
    for name, keys in sorted(keys_of.items()):
        path = index.parent / name
        if not path.is_file():
            raise CheckpointError(f"{path}, named in {index.name}, is missing; download it again")
        shard = opener(path)
        for key in sorted(keys - shard.shapes.keys()):
            raise CheckpointError(f"{path}: {key} is missing, but {index.name} lists it there")
        for key in sorted(shard.shapes.keys() - keys):
            raise CheckpointError(f"{path}: holds {key}, but {index.name} does not list it there")
        shards.append(shard)
    return shards


def _open_safetensors(path: Path) -> Shard:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({one_line(error)}); download it again") from None
    shapes = {}
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        part = file.get_slice(key)
        # Any other kind is refused later, by name; int64 stands for all of them.
        kind = _SAFETENSORS_DTYPES.get(part.get_dtype(), torch.int64)
        shapes[key] = torch.empty(part.get_shape(), dtype=kind, device="meta")
    return Shard(path, shapes, file.get_tensor)


def _open_pickle(path: Path) -> Shard:
    def load(mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        try:
            state = load(mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state = load(mmap=False)  # torch's format before 1.6; it cannot be mapped
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: damaged, or holds more than tensors, which is not executed; "
            "use a safetensors file"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged ({one_line(error)}); download it again") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
    shapes = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in state.items()}
    return Shard(path, shapes, state.__getitem__)


def write_weights(
    folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int
) -> None:
    """Write model.safetensors, or shards of at most ``max_bytes`` and their index, to ``folder``.

    ``dtype`` is that of the written tensors; None: as they are.
    """
    shards = list(in_parts(state, lambda key: _bytes(state[key], dtype), max_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [_SINGLE]
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: state[key].to(dtype or state[key].dtype).contiguous() for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    with_usual_mode(folder, [folder / name for name in names])
    if len(shards) > 1:
        total = sum(_bytes(tensor, dtype) for tensor in state.values())
        weight_map = {key: n for n, keys in zip(names, shards, strict=True) for key in keys}
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a folder to write files into; on leaving, they replace those of ``folder`` all at once.

    They are written and synced beside the present files. One rename of their folder then decides:
    before it the present files count, after it the new ones do. These are then renamed one by one
    here or, after an interruption, by the next ``finish_commit``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_commit(folder)
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)  # left by a save that was killed
    staging.mkdir()
    try:
        yield staging
        write_json(staging / _MANIFEST, {"files": sorted(p.name for p in staging.iterdir())})
        for path in (*staging.iterdir(), staging):
            sync(path)
        os.replace(staging, folder / _COMMITTED)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync(folder)
    finish_commit(folder)


def finish_commit(folder: Path) -> None:
    """Carry out the renames of a complete ``replacing``, also where they were interrupted.

    Weights of an earlier save that the new one does not replace (other shards) are removed.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    committed = folder / _COMMITTED
    if not committed.is_dir():
        return
    try:
        if (committed / _MANIFEST).exists():
            names = read_json(committed / _MANIFEST)["files"]
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # moved before, or by another process
                    os.replace(committed / name, folder / name)
            for old in (
                *folder.glob("model-*-of-*.safetensors"),
                folder / _SINGLE,
                folder / _INDEX,
            ):
                if old.name not in names:
                    old.unlink(missing_ok=True)
            sync(folder)
        shutil.rmtree(committed, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{committed}: cannot be moved into place ({one_line(error)})"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; CheckpointError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({one_line(error)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(data).__name__}, not an object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, indented and with sorted keys."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it, so that it is never there in part. Raises
    OSError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def with_usual_mode(folder: Path, paths: Iterable[Path]) -> None:
    """Give files the mode that new files in the folder get. safetensors makes files that only their
    owner can read (0600, whatever the umask), so that another user could not serve a model."""
    probe = folder / f".mode.{os.getpid()}.part"  # os.umask would change it for the process
    handle = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()
    for path in paths:
        path.chmod(mode)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk: a name is flushed with its folder, not with
    its file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_line(error: BaseException) -> str:
    """A library's error as one line, of limited length."""
    return " ".join(str(error).split())[:240] or type(error).__name__
