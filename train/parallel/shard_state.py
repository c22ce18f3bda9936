"""Training state of several processes on disk: a folder into which each writes its own shards.

PyTorch's distributed checkpoint (`torch.distributed.checkpoint`) writes and reads the tensors. Each
process writes its part in the background, and any number of processes can read them, even one
without a process group. Everything that is not a tensor (settings of the optimizers, the step) is
in ``rest.pt`` beside them. The folder has the same name as the file of a run of one process. It too
is first written beside that name and then renamed, and the previous one is kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from echogen.engine.checkpoints.shards import sync
from echogen.train.parallel.whole import like
from echogen.train.run.checkpoint import (
    StateError,
    fallen_back,
    previous,
    reason,
    save_state,
    whole_state,
)

REST = "rest.pt"
SEPARATOR = "/"

Template = Callable[[str], Tensor | None]
"""Gives, for a flat name, a tensor with the device and sharding to load into. None: as stored."""


class Saver:
    """Writes states in the background, one at a time, by all processes of ``group``.

    Args:
        group: a process group on the CPU that nobody else uses, since it is used in a thread.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._first = group, dist.get_rank(group) == 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._path = Path()

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Copy the state and start writing it; `settle` waits for the outcome."""
        self.settle()
        beside = path.with_name(path.name + ".part")
        tensors, rest = flat(state)
        if self._first:
            path.parent.mkdir(parents=True, exist_ok=True)
            if beside.is_dir():
                shutil.rmtree(beside)
            save_state(beside / REST, rest)
        dist.barrier(self._group)  # nobody writes into a folder that is about to be moved away
        writer = dcp.FileSystemWriter(beside, overwrite=True)
        saved = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(saved, Future)
        self._path, self._pending = path, self._thread.submit(self._finish, saved, beside, path)

    def _finish(self, saved: Future[Any], beside: Path, path: Path) -> None:
        saved.result()  # in the first process: every process has written its part
        if self._first:
            set_aside(path)
            os.replace(beside, path)
            sync(path.parent)

    def settle(self, patience: float | None = None) -> None:
        """Wait until the pending state is on the disk, for ``patience`` seconds at most (None: no
        limit).

        Raises:
            StateError: it could not be written (in ``patience`` seconds); the previous state is
                untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if wait([pending], patience).not_done:
            raise StateError(
                f"{self._path}: not written in {patience:g} seconds, and given up; the previous "
                f"state is untouched, so go on with --resume"
            )
        try:
            pending.result()
        except (CheckpointException, OSError) as error:
            raise StateError(
                f"{self._path}: cannot be written ({_reason(error)}); the previous state is "
                f"untouched, so make room and go on with --resume"
            ) from error


def set_aside(path: Path) -> None:
    """Make what is at ``path`` the previous state."""
    if not path.exists():
        return
    if previous(path).is_dir():
        shutil.rmtree(previous(path))
    else:
        previous(path).unlink(missing_ok=True)
    os.replace(path, previous(path))


def read(path: Path, template: Template, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Read a state, a file or a folder, in all processes of ``group``; None: in one process alone.

    If it is torn or missing, the previous one is read; its name is then under "fallen_back".

    Raises:
        StateError: neither can be read.
    """
    return fallen_back(path, lambda place: _read(place, template, group), or_previous=True)


def _read(path: Path, template: Template, group: dist.ProcessGroup | None) -> dict[str, Any]:
    if not path.is_dir():
        tensors, rest = flat(whole_state(path))
        return nested({k: like(v, template(k)) for k, v in tensors.items()} | rest)
    rest = whole_state(path / REST)
    try:
        reader = dcp.FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        wanted = {k: _empty(m, template(k)) for k, m in stored.items()}
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError) as error:
        raise StateError(f"{path}: no whole training state ({_reason(error)})") from None
    return nested(wanted | rest)


def _empty(stored: Any, template: Tensor | None) -> Tensor:
    if not isinstance(stored, TensorStorageMetadata):
        raise ValueError(f"holds a {type(stored).__name__} where a tensor is due")
    # An optimizer's step counter is stored under a parameter, but is a number.
    if template is not None and template.shape == stored.size:
        return torch.empty_like(template, dtype=stored.properties.dtype)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def flat(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested dictionaries and lists into the tensors, by flat name, and everything else."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in _leaves(state, ""):
        into: dict[str, Any] = tensors if isinstance(value, Tensor) else rest
        into[name] = value
    return tensors, rest


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Indices of a list are written #0, #1, …; integer keys, as optimizers have them, %0. Empty
    containers are leaves."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            word = f"%{key}" if isinstance(key, int) else key
            yield from _leaves(item, f"{name}{SEPARATOR}{word}" if name else word)
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}{SEPARATOR}#{i}")
    else:
        yield name, value


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`, given its two results merged."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *path, last = name.split(SEPARATOR)
        here = tree
        for word in path:
            here = here.setdefault(word, {})
        here[last] = value
    return _listed(tree)


def _listed(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if tree and all(key.startswith("#") for key in tree):
        return [_listed(tree[f"#{i}"]) for i in range(len(tree))]
    return {
        int(key[1:]) if key.startswith("%") else key: _listed(value) for key, value in tree.items()
    }


def _reason(error: BaseException) -> str:
    """The cause in one line; a distributed failure names one for each process."""
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(f"process {rank}: {_reason(e[0])}" for rank, e in failures.items())
    return reason(error)
