"""Load and launch the CUDA C++ kernels: from the fatbins that CMake builds beside the sources, or
else compiled by NVRTC at first use. Both go through CuPy, which brings NVRTC and the driver.

Nothing is looked for before the first call on CUDA: a machine without a GPU, CuPy or nvcc imports
every operator and runs its reference.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
NVRTC_OPTIONS = ("--std=c++17", f"-I{FOLDER}")
"""CuPy adds -arch and -ftz=true; CMakeLists.txt has the latter too, so that both builds agree."""
INSTALL = "pip install -e '.[cuda]'"
WAITS = 90  # architecture from which `wait_for_earlier` takes effect (device.cuh)
CTYPES: dict[type, Any] = {
    np.uint64: ctypes.c_void_p,
    np.float32: ctypes.c_float,
    np.int64: ctypes.c_longlong,
}
NAMED: defaultdict[str, set[str]] = defaultdict(set)
"""Names of the kernels that launchers use, by source."""


@dataclass(frozen=True)
class Gpu:
    """What launchers need to know about a device.

    Attributes:
        sms: streaming multiprocessors.
        shared_bytes: the most shared memory that one block may have.
        warps: the most warps that a multiprocessor holds.
    """

    sms: int
    shared_bytes: int
    warps: int = 64


H200 = Gpu(132, 232448)
GPUS = {
    "sm_80": Gpu(108, 166912),
    "sm_86": Gpu(82, 101376, 48),
    "sm_89": Gpu(128, 101376, 48),
    "sm_90": H200,
    "sm_100": Gpu(148, 232448),
    "sm_120": Gpu(170, 101376, 48),
}
"""By their architectures: an A100, a GeForce RTX 3090, an RTX 4090, an H200, a B200, an RTX 5090.
Others of an architecture differ in their number of multiprocessors alone: an A10 has 72."""
RECORDED_FOR = ContextVar("recorded_for", default=H200)


def gpu(device: torch.device) -> Gpu:
    """The GPU that a launch on ``device`` is for. If that is not CUDA, the GPU that launches are
    recorded for: an H200, unless `echogen.kernels.dispatch.recorded` was given another."""
    return _properties(device) if device.type == "cuda" else RECORDED_FOR.get()


@cache
def _properties(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stubs
    warps = found.max_threads_per_multi_processor // found.warp_size
    return Gpu(found.multi_processor_count, shared, warps)


def fatbin(source: str) -> Path | None:
    """The fatbin that CMake built of a source; None if it is missing, or if the source or a header
    has changed since. Contents are compared, as copying, installing and checking out reorder the
    files' times."""
    built = FOLDER / f"{source}.fatbin"
    listed = FOLDER / f"{source}.fatbin.sources"
    if not built.exists() or not listed.exists():
        return None
    files = [path for path in (FOLDER / f"{source}.cu", *FOLDER.glob("*.cuh")) if path.exists()]
    now = {f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files}
    return built if set(listed.read_text().splitlines()) == now else None


@cache
def unloadable() -> str | None:
    """Why CuPy, without which no CUDA C++ kernel can be launched, cannot be imported; None if it
    can. An installed CuPy may lack its own dependencies, which only its import reveals."""
    if find_spec("cupy") is None:
        return "cupy is absent"
    try:
        import_module("cupy")
    except ImportError as error:
        return f"cupy cannot be imported ({_reason(error)})"
    return None


def unusable(source: str, device: torch.device) -> str | None:
    """Why the kernels of a source cannot be launched on a GPU; None if they can. The first call
    loads them and must not be captured in a graph: only then does CuPy look for NVRTC, and the
    driver accept or refuse the code."""
    try:
        return unloadable() or _load(source, device)
    except MemoryError as error:
        return str(error)


@cache
def _load(source: str, device: torch.device) -> str | None:
    """See `unusable`. Raises MemoryError if memory is short, so that a later call tries again."""
    try:
        _loaded(source, device)
    except Exception as error:  # CuPy, NVRTC and the driver each raise kinds of their own
        why = f"{source}.cu cannot be loaded ({_reason(error)})"
        if _lacks_memory(error):
            raise MemoryError(why) from error
        return why
    return None


def _lacks_memory(error: Exception) -> bool:
    return "OUT_OF_MEMORY" in str(error)  # of CUDA_ERROR_OUT_OF_MEMORY


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def status(source: str) -> str:
    """Describe in words what runs the operators of a source on a GPU here, and why; if there is a
    GPU, by loading them."""
    refused = None
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        why = unusable(source, device)
        if why is None:
            refused = _loaded(source, device).refused
    else:
        why = unloadable()
    if why is not None:
        return f"reference: {why}"
    if refused is not None:
        return f"CUDA C++, by NVRTC: the fatbin cannot be loaded ({refused}; make cuda)"
    if fatbin(source) is not None:
        return "CUDA C++, from its fatbin"
    stale = (FOLDER / f"{source}.fatbin").exists()
    missing = "the fatbin was built of other sources" if stale else "no fatbin"
    return f"CUDA C++, by NVRTC at first use: {missing} (make cuda)"


class CudaKernel:
    """One kernel, launched like Triton's: ``kernel[grid](*arguments, block=…, shared=…)``.

    A launch neither allocates nor waits, and can be captured in a CUDA graph once the kernel is
    loaded on its device (`unusable`). Arguments are passed as the kernels declare them: tensors as
    pointers (None as null), ints as ``long long``, floats as ``float``.

    Args:
        source: the file's name without ``.cu``.
        name: the kernel's name, ``extern "C"``.
        overlaps: whether it takes part in `echogen.kernels.overlap`.
    """

    def __init__(self, source: str, name: str, overlaps: bool = False) -> None:
        self.source, self.__name__ = source, name
        self.arg_names = ("DEPENDENT",) if overlaps else ()
        NAMED[source].add(name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(
        self,
        grid: tuple[int, ...],
        *arguments: Any,
        block: int,
        shared: int = 0,
        DEPENDENT: bool = False,
        launch_pdl: bool = False,
    ) -> None:
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.cuda.device(device):
            import cupy

            function = _loaded(self.source, device).functions[self.__name__]
            stream, values = torch.cuda.current_stream(device), tuple(map(_argument, arguments))
            # Code for an older device, which the driver translates for this one, would not wait.
            if DEPENDENT and function.ptx_version >= WAITS:
                _launch_dependent(function, stream, grid, block, shared, values)
                return
            with cupy.cuda.Stream.from_external(stream):
                function(grid, (block,), values, shared_mem=shared)


def _launch_dependent(
    function: Any,
    stream: torch.cuda.Stream,
    grid: tuple[int, ...],
    block: int,
    shared: int,
    values: tuple[np.generic, ...],
) -> None:
    """Launch a kernel that may begin while the previous one runs, which CuPy cannot express."""
    from cuda.bindings import driver

    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    allowed = driver.CUlaunchAttributeValue()
    allowed.programmaticStreamSerializationAllowed = 1
    overlap.value = allowed
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream.cuda_stream
    config.attrs, config.numAttrs = [overlap], 1
    kinds = tuple(CTYPES[type(value)] for value in values)
    passed = (tuple(value.item() for value in values), kinds)
    (error,) = driver.cuLaunchKernelEx(config, driver.CUfunction(function.kernel.ptr), passed, 0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuLaunchKernelEx: {error.name}")


def _argument(value: Any) -> np.generic:
    if value is None:
        return np.uint64(0)
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    return np.float32(value) if isinstance(value, float) else np.int64(value)


@dataclass(frozen=True)
class Loaded:
    """The kernels of a source on one device.

    Attributes:
        functions: CuPy's functions, by the kernels' names.
        refused: why they were compiled although there is a fatbin; None: they were not.
    """

    functions: dict[str, Any]
    refused: str | None = None


@cache
def _loaded(source: str, device: torch.device) -> Loaded:
    """Load every kernel that launchers name, from the fatbin or else, also where the driver refuses
    it (it is cut short, has no code for this GPU, or a newer toolkit built it), from the source."""
    import cupy

    built, refused = fatbin(source), None
    if built is not None:
        try:
            return Loaded(_functions(source, device, cupy.RawModule(path=str(built))))
        except Exception as error:
            if _lacks_memory(error):
                raise
            refused = _reason(error)
    code = (FOLDER / f"{source}.cu").read_text()
    options = (*NVRTC_OPTIONS, f"-DECHOGEN_HEADERS={_headers()}")
    try:
        return Loaded(
            _functions(source, device, cupy.RawModule(code=code, options=options)), refused
        )
    except Exception as error:
        if refused is None:
            raise
        raise RuntimeError(f"{_reason(error)}; of its fatbin: {refused}") from error


def _functions(source: str, device: torch.device, module: Any) -> dict[str, Any]:
    """Kernels that may use all of the device's shared memory, a limit that CuPy sets on the current
    device."""
    found: dict[str, Any] = {}
    with torch.cuda.device(device):
        for name in NAMED[source]:
            found[name] = function = module.get_function(name)
            free = gpu(device).shared_bytes - function.shared_size_bytes
            function.max_dynamic_shared_size_bytes = free
    return found


def _headers() -> str:
    """A digest of the headers that sources include: CuPy caches compiled code by source and
    options, and would not notice that a header changed."""
    headers = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.cuh")))
    return hashlib.blake2b(headers, digest_size=8).hexdigest()
