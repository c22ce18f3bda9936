"""Named ranges nest, carry their numbers, and cost nothing where nobody listens."""

from __future__ import annotations

import subprocess
import sys
import timeit
import types
from importlib import metadata

import numpy as np
import pytest
import torch

from echogen.engine import ranges
from echogen.engine.ranges import NvtxRanges, TorchRanges, listening, span


class Heard:
    def __init__(self):
        self.said = []

    def begin(self, category, payload):
        self.said.append((category, payload))

    def end(self):
        self.said.append("end")


def test_a_listener_hears_nested_ranges_with_their_numbers():
    heard = Heard()
    with listening(heard):
        with span("engine/decode", batch=2), span("engine/decode/step", step=3):
            pass
        with pytest.raises(KeyError), span("train/checkpoint"):
            raise KeyError
    with span("engine/decode"):
        pass
    assert heard.said == [
        ("engine/decode", {"batch": 2}), ("engine/decode/step", {"step": 3}), "end", "end",
        ("train/checkpoint", {}), "end",
    ]  # fmt: skip


def test_a_listener_that_leaves_within_a_range_still_hears_its_end():
    heard = Heard()
    with listening(heard):
        open_range = span("engine/decode")
        open_range.__enter__()
    open_range.__exit__(None, None, None)
    assert heard.said == [("engine/decode", {}), "end"]


def test_silence_costs_next_to_nothing():
    """A range takes below 3 µs, ten times its time on a quiet core; the smallest model's step takes
    500 µs."""
    with_range = min(
        timeit.repeat("with span('a/b', step=1): pass", globals={"span": span}, number=2000)
    )
    assert with_range / 2000 < 3e-6
    assert span("a/b") is span("c/d")


def test_torch_profiler_shows_them():
    with (
        listening(TorchRanges()),
        torch.profiler.profile() as profiled,
        span("engine/decode", batch=2),
    ):
        torch.ones(3) + 1
    (event,) = [e for e in profiled.events() if e.name == "echogen:engine/decode"]
    assert any(child.name == "aten::add" for child in event.cpu_children)


@pytest.fixture
def fake_nvtx(monkeypatch):
    """A stand-in for the package that records its calls."""
    said = []

    class Domain:
        def push_range(self, **attributes):
            said.append(attributes)

        def pop_range(self):
            said.append("pop")

    module = types.ModuleType("nvtx")
    module.get_domain = lambda name: said.append(name) or Domain()
    monkeypatch.setitem(sys.modules, "nvtx", module)
    return said


def test_nvtx_gets_domain_name_category_and_payload(fake_nvtx):
    with listening(NvtxRanges()):
        with span("train/cycle-rl/rollout", step=7, tokens=64):
            pass
        with span("engine/decode"):
            pass
    domain, first, _, second, _ = fake_nvtx
    assert domain == "echogen"
    # Nsight Compute's filters read a slash in a name as nesting.
    assert (first["message"], first["category"]) == ("rollout", "train/cycle-rl/rollout")
    assert first["payload"]["step"] == 7 and first["payload"]["tokens"] == 64
    assert first["payload"].dtype == np.dtype([("step", np.int64), ("tokens", np.int64)])
    assert second["payload"] is None and second["color"] == ranges.COLOURS["engine"]


def test_real_nvtx_takes_them_without_a_profiler():
    pytest.importorskip("nvtx")
    with listening(NvtxRanges()), span("engine/decode/step", step=1, batch=2):
        pass


@pytest.mark.parametrize(
    ("installed", "why"),
    [
        (None, "nvtx is not installed"),
        ("0.2.14", "nvtx 0.2.14 is older than 0.2.15"),  # its ranges accept no text
    ],
)
def test_without_the_package_nothing_is_emitted(monkeypatch, installed, why):
    def version(name):
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    assert ranges.nvtx_missing() == why
    assert ranges.enable_nvtx() is False and ranges._listeners == ()


@pytest.mark.parametrize(("value", "listens"), [("1", True), ("0", False)])
def test_the_environment_turns_nvtx_on(value, listens):
    pytest.importorskip("nvtx")
    code = "from echogen.engine import ranges; print(len(ranges._listeners))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"ECHOGEN_NVTX": value}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert int(done.stdout) == listens
