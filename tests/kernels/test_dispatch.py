"""How operators reach their implementations, seen from outside: every one is registered whole, and
an interpreted run enters every kernel there is."""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from echogen import kernels
from echogen.bench.registry import NO_CASE, Drawn, cases
from echogen.bench.speed import contest
from echogen.kernels import dispatch, gumbel, logprob
from echogen.kernels.cuda import loader

MODULES = [
    importlib.import_module(f"echogen.kernels.{m.name}")
    for m in pkgutil.iter_modules(kernels.__path__)
    if not m.ispkg
]
CASES = cases()


def launchable() -> set[str]:
    """Names of all Triton kernels that launchers launch; device code has no such name."""
    return {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, (triton.JITFunction, InterpretedFunction)) and name.endswith("_kernel")
    }


@pytest.mark.parametrize("name", sorted(dispatch.OPERATORS))
def test_every_operator_is_registered_whole(name):
    """Implementations for both devices and a fake rule; an autograd rule where it trains."""
    operator = getattr(torch.ops.echogen, name).default
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has(operator.name(), key) for key in ("CPU", "CUDA", "Meta"))
    if f"{name}_backward" in dispatch.OPERATORS:
        assert has(operator.name(), "Autograd")


@pytest.mark.parametrize("name", sorted(dispatch.OPERATORS))
def test_what_is_written_to_has_no_default(name):
    """Or torch 2.11 ends calls without it, or with the default itself, in an IndexError."""
    schema = getattr(torch.ops.echogen, name).default._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert not [a.name for a in written if a.has_default_value()]


def test_every_operator_is_measured_or_excused():
    measured = {case.operator for case in CASES.values()}
    forward = {name for name in dispatch.OPERATORS if not name.endswith("_backward")}
    assert forward == measured | NO_CASE.keys() and not measured & NO_CASE.keys()


def test_one_name_runs_through_module_reference_and_test():
    here, top = Path(__file__).parent, Path(kernels.__path__[0])
    for module in {operator.module for operator in dispatch.OPERATORS.values()}:
        name = module.rpartition(".")[2]
        assert (top / "reference" / f"{name}.py").exists() and (here / f"test_{name}.py").exists()


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_eager_torch(name, device):
    """Outputs and gradients of every case the benchmark times, at its smallest size."""
    case = CASES[name]
    for dtype in case.types(device):
        inputs = case.inputs(Drawn(torch.Generator(device)), case.sizes["tiny"], dtype)
        wanted = contest.results(case, case.eager, contest.raised(inputs), case.outputs)
        found = contest.results(case, case.run, inputs, case.outputs)
        assert found.keys() == wanted.keys()
        contest.check(case, case.bounds[dtype], "echogen", found, wanted)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="is about an interpreted run")
def test_an_interpreted_run_enters_every_triton_kernel(device, launched, monkeypatch):
    # So that the smallest size is cut into parts too.
    monkeypatch.setattr(gumbel, "SPLITS", gumbel.Splits(least=64))
    for case in CASES.values():
        (dtype,), make = case.types("cpu"), Drawn(torch.Generator(device))
        inputs = case.inputs(make, case.sizes["tiny"], dtype)
        contest.results(case, case.run, inputs, case.outputs)
    assert len(launchable()) >= 20 and set(launched) == launchable()


def test_an_empty_grid_launches_nothing(launched):
    class Kernel:
        __name__ = "_kernel"

        def __getitem__(self, grid):
            raise AssertionError("launched")

    dispatch.launch(Kernel(), (3, 0))
    assert not launched


def test_a_launch_goes_where_its_tensors_are(monkeypatch):
    """Triton launches on the current device: on another one it must be made current."""
    made, current = [], ["cuda:0"]

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.before, current[0] = current[0], str(self.device)

        def __exit__(self, *_):
            current[0] = self.before

    class Kernel:
        __name__ = "_kernel"

        def __getitem__(self, grid):
            return lambda *_, **__: made.append(current[0])

    class OnCuda(torch.Tensor):
        device = property(lambda self: torch.device("cuda:1"))

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    there = torch.zeros(1).as_subclass(OnCuda)
    dispatch.launch(Kernel(), (1,), 3, there)
    dispatch.launch(Kernel(), (1,), torch.zeros(1))
    assert made == ["cuda:1", "cuda:0"]


def test_autocast_changes_no_operator(device, generator):
    """Launchers know none of it; nor may the references, whose products it would round."""
    x = torch.randn(4, 33, generator=generator).to(device)
    weight = torch.randn(7, 33, generator=generator).to(device)
    targets = torch.arange(4, device=device)
    wanted = logprob.linear_logprob(x, weight, targets)
    with torch.autocast(device, torch.bfloat16):
        found = logprob.linear_logprob(x, weight, targets)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_runs_where(monkeypatch):
    kind = "Triton, interpreted" if dispatch.INTERPRETED else "reference"
    assert dispatch.implementation("box_reward", "cpu") == kind
    assert dispatch.implementation("box_reward", "cuda") == "Triton"
    assert dispatch.implementation("skinny_linear", "cpu") == "reference"
    monkeypatch.setattr(loader, "unloadable", lambda: "cupy is absent")
    assert dispatch.implementation("skinny_linear", "cuda") == "reference: cupy is absent"
    monkeypatch.setattr(dispatch, "FORCE_REFERENCE", True)
    for name in ("skinny_linear", "box_reward"):
        assert dispatch.implementation(name, "cuda") == "reference (forced)"


def test_without_cupy_cuda_falls_back_and_says_so_once(monkeypatch):
    def fails(x):
        raise AssertionError("launched")

    on_cuda = dispatch._on_cuda("skinny_linear", lambda x: x + 1, fails, "CUDA C++")
    monkeypatch.setattr(loader, "unloadable", lambda: "cupy is absent")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        assert [on_cuda(torch.tensor(i)) for i in range(3)] == [1, 2, 3]
    assert len(seen) == 1 and "skinny_linear runs on plain torch: cupy" in str(seen[0].message)
    monkeypatch.setattr(loader, "unusable", lambda *_: None)
    with pytest.raises(AssertionError, match="launched"):
        on_cuda(torch.tensor(0))


def test_memory_that_lacks_for_a_moment_is_asked_for_again(monkeypatch):
    def lacks(*_):
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")

    device = torch.device("cuda", 99)
    monkeypatch.setattr(loader, "unloadable", lambda: None)
    monkeypatch.setattr(loader, "_loaded", lacks)
    assert "OUT_OF_MEMORY" in loader.unusable("skinny_linear", device)
    monkeypatch.setattr(loader, "_loaded", lambda *_: None)
    assert loader.unusable("skinny_linear", device) is None


def test_kernels_that_cannot_be_loaded_fall_back_too(monkeypatch):
    """CuPy is there, but the NVRTC that it looks for at the first launch is not, say."""
    monkeypatch.setattr(loader, "unloadable", lambda: None)
    monkeypatch.setattr(loader, "_load", loader._load.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def fails(*_):
        raise RuntimeError("CuPy failed to load libnvrtc.so.13: OSError\nmore")

    monkeypatch.setattr(loader, "_loaded", fails)
    why = "skinny_linear.cu cannot be loaded (CuPy failed to load libnvrtc.so.13: OSError)"
    assert dispatch.implementation("skinny_linear", "cuda") == f"reference: {why}"
    monkeypatch.setattr(loader, "_load", lambda *_: why)
    on_cuda = dispatch._on_cuda("skinny_linear", lambda x: x + 1, fails, "CUDA C++")
    with pytest.warns(UserWarning, match=f"{re.escape(why)}$"):
        assert on_cuda(torch.tensor(1)) == 2
    monkeypatch.setattr(loader, "_load", lambda *_: None)
    monkeypatch.setattr(loader, "_loaded", lambda *_: loader.Loaded({}))
    assert dispatch.implementation("skinny_linear", "cuda").startswith("CUDA C++")


def test_only_tritons_kernels_are_told_of_tritons_options(monkeypatch):
    """A kernel of CUDA C++ takes its block and its memory, and no other word."""
    told = []
    monkeypatch.setattr(loader, "NAMED", {"any": set()})
    cuda = loader.CudaKernel("any", "anyone")
    monkeypatch.setattr(cuda, "_launch", lambda grid, *_, block: told.append(block))
    dispatch.launch(cuda, (1,), torch.zeros(1), block=128)
    assert told == [128]
    x = torch.zeros(2, 8)
    with dispatch.recorded() as launches:
        torch.ops.echogen.swiglu(x)
    assert launches[0].constants["enable_fp_fusion"] is True
