"""Drawing in C++ computes what the transformer does, and a token's logits depend only on its own
sequence, to the last bit."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import echogen
from echogen.engine.cache import WindowCache
from echogen.engine.checkpoints.weights import load_checkpoint
from echogen.engine.cpu import loader
from echogen.engine.cpu.native import (
    NativeDecoding,
    NativeTransformer,
    Sequences,
    gumbel_noise,
    why_not_native,
)
from echogen.engine.cpu.packed import PackedTransformer
from echogen.engine.decoding.decode import decode_image, left_padded, packed
from echogen.engine.decoding.jacobi import decode_windows
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import Engine
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.serving.rows import NativeRows
from echogen.kernels import philox

BOS, PAD, BEGIN, T = 1, 0, 58, 16
# Outputs, inputs and codes that do not fill whole registers; grouped heads; heads of every
# register's size; a head wider than the model.
SHAPES = {
    "odd": {"hidden_size": 51, "head_dim": 16, "intermediate_size": 90},
    "grouped heads": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    "wide heads": {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                   "head_dim": 112},
    "many": {"hidden_size": 81, "head_dim": 64, "num_hidden_layers": 3, "intermediate_size": 200},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request, tmp_path_factory, janus_config, random_janus) -> UnifiedTransformer:
    folder = tmp_path_factory.mktemp("checkpoint")
    random_janus(janus_config(**SHAPES[request.param]), seed=7).save_pretrained(folder)
    made = load_checkpoint(folder).transformer
    if isinstance(why := why_not_native(made), loader.CompilerError):
        pytest.skip(str(why))
    assert why is None
    return made


@pytest.fixture(scope="module")
def tiny() -> Engine:
    engine = Engine.from_pretrained("tiny")
    if isinstance(why := why_not_native(engine.transformer), loader.CompilerError):
        pytest.skip(str(why))
    return engine


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float64, torch.bfloat16, "meta"], ids=str)
def defaults(request):
    """Changes torch's default dtype or device when called, and restores it at the end."""
    if request.param == "meta":
        yield lambda: torch.set_default_device("meta")
        torch.set_default_device(None)
    else:
        yield lambda: torch.set_default_dtype(request.param)
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def untried(monkeypatch):
    """The loader's state in a process that has loaded nothing."""
    loader._library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    loader._library.cache_clear()


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(3, BEGIN, (length - 2,), generator=generator).tolist()
    return [BOS, *middle, BEGIN]


def table_of(model: UnifiedTransformer) -> Tensor:
    with torch.no_grad():
        return model.code_table()


def uncached(model: UnifiedTransformer, ids: list[int], codes: list[int]) -> Tensor:
    """Logits after the prompt and each code, by one forward over all of them in float64."""
    model = copy.deepcopy(model).double()
    embedded = torch.cat((model.embed_text(torch.tensor(ids)), table_of(model)[codes]))[None]
    length = embedded.shape[1]
    mask = additive_mask(torch.ones(1, length, length).tril().bool(), torch.float64)
    hidden = model(embedded, torch.arange(length), mask)
    return model.image_head(hidden[0, len(ids) - 1 :])


def opened(
    weights: NativeTransformer, table: Tensor, prompts: list[list[int]]
) -> tuple[NativeDecoding, Tensor]:
    decoding = NativeDecoding(weights, table, *left_padded(prompts, PAD), T, guided=False)
    return decoding, decoding.prefill()


@torch.inference_mode()
def test_logits_are_those_of_an_uncached_forward_in_float64(model, relative_error):
    """With prompts of several lengths, two of them equal; by steps, and by windows that overwrite a
    draft."""
    prompts = [prompt(n, n) for n in (9, 3, 9, 17)]
    codes = torch.randint(24, (4, T), generator=torch.Generator().manual_seed(1))
    pairs = zip(prompts, codes.tolist(), strict=True)
    wanted = torch.stack([uncached(model, ids, row) for ids, row in pairs])
    decoding, logits = opened(NativeTransformer(model), table_of(model), prompts)
    assert decoding.held == 9 + 3 + 17
    assert relative_error(logits.double(), wanted[:, 0]) < 1e-5
    for at in range(4):
        logits = decoding.step(codes[:, at])
        assert relative_error(logits.double(), wanted[:, at + 1]) < 1e-5
    for first, width in (([4, 4, 4, 4], 3), ([6, 2, 7, 0], 9), ([9, 9, 1, 9], 1)):
        fed = torch.stack([row[at : at + width] for row, at in zip(codes, first, strict=True)])
        decoding.window((fed + 1) % 24, first)
        logits = decoding.window(fed, first)
        for row, at in enumerate(first):
            behind = wanted[row][at + 1 : at + 1 + width]
            assert relative_error(logits[row].double(), behind) < 1e-5


@torch.inference_mode()
def test_bits_hang_on_nothing_but_the_sequence(tiny, threads):
    """Alone and among others, code by code and in windows, on one thread and on several, after a
    prompt that is shared and after one that was copied into the cache."""
    weights, table = NativeTransformer(tiny.transformer), tiny.code_table
    prompts = [[1, *range(20, 20 + n), 30] for n in (17, 40, 17, 5)] * 9
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(1024, (len(prompts), 40), generator=generator)

    def drawn(rows: list[int], widths: list[int], share: bool = True) -> Tensor:
        ids, pads = left_padded([prompts[row] for row in rows], 0)
        decoding = NativeDecoding(weights, table, ids, pads, 64, False, share)
        copies = [prompts[row] for row in rows]
        assert decoding.held == sum(map(len, {*map(tuple, copies)} if share else copies))
        parts, at = [decoding.prefill()[:, None]], 0
        for width in widths:
            fed = codes[rows, at : at + width]
            single = width == 1 and at == len(parts) - 1  # `step` continues only from steps
            parts.append(
                decoding.step(fed[:, 0])[:, None]
                if single
                else decoding.window(fed, [at] * len(rows))
            )
            at += width
        return torch.cat(parts, 1)

    threads(1)
    everyone = list(range(len(prompts)))
    wanted = drawn(everyone, [1] * 40)
    assert torch.equal(drawn(everyone, [3, 1, 16, 20]), wanted)
    for row in (0, 1, 7):
        assert torch.equal(drawn([row], [40]), wanted[row : row + 1])
    assert torch.equal(drawn([5, 3], [7, 33]), wanted[[5, 3]])
    assert torch.equal(drawn([2, 0, 2], [40], share=False), wanted[[2, 0, 2]])
    for count in (2, 5):
        threads(count)
        assert torch.equal(drawn(everyone, [3, 1, 16, 20]), wanted)

    cache = WindowCache(weights.config, 3, 128, torch.float32, "cpu")
    cache.block.fill_(float("nan"))  # what no token wrote must not be read
    runner = NativeRows(weights, table, cache)
    ends = []
    for slot, row in enumerate((2, 1, 3)):
        (prefix,) = runner.run_prompts([prompts[row]])
        ends.append(prefix.keys_values.shape[-2])
        cache.block[:, :, slot, :, : ends[-1]].copy_(prefix.keys_values)
    at = torch.tensor(ends)
    found = [runner.step(codes[[2, 1, 3], i], at + i, 128) for i in range(8)]
    assert torch.equal(torch.stack(found, 1), wanted[[2, 1, 3], 1:9])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(cfg=4.0, top_k=9)])
def test_windows_draw_what_single_codes_draw(model, sampling):
    weights, table = NativeTransformer(model), table_of(model)
    rows = [prompt(n, n) for n in (4, 11)]
    rows += [[BOS, PAD, BEGIN]] * 2 if sampling.guided else []

    def sampler() -> Sampler:
        return Sampler(sampling, 3, torch.arange(2), model.config.codebook_size, T)

    wanted = decode_image(weights, table, rows, sampler(), PAD)
    assert len(wanted.unique()) > 3
    for window in (1, 2, 7, T):
        drawn = decode_windows(weights, table, rows, sampler(), PAD, window)
        assert torch.equal(drawn.codes, wanted)


def test_the_longest_prompt_fits(model):
    longest = model.config.max_positions - T
    rows = [prompt(longest, 0)]
    sampler = Sampler(Sampling(temperature=0), 0, torch.arange(1), 24, T)
    double = copy.deepcopy(model).double()
    wanted = decode_image(double, table_of(double), rows, sampler, PAD)
    for window in (1, 5):
        drawn = decode_windows(
            NativeTransformer(model), table_of(model), rows, sampler, PAD, window
        )
        assert torch.equal(drawn.codes, wanted)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FC000FF, -0x3FFFFF])
@pytest.mark.parametrize("part", ["qkv", "gate_up"])
@torch.inference_mode()
def test_what_is_no_number_is_not_hidden(model, part, bits):
    """A NaN shows, whatever its other bits are."""
    broken = copy.deepcopy(model)
    weight = getattr(broken.blocks[1], part).weight
    weight[0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert weight[0, 0].isnan()
    decoding, logits = opened(NativeTransformer(broken), table_of(model), [prompt(5, 0)])
    assert logits.isnan().all()
    assert decoding.step(torch.tensor([3])).isnan().all()


@pytest.mark.parametrize(
    ("ids", "row", "at", "words"),
    [
        ([3, 24], [0, 1], [0, 0], "an id that the embedding does not have"),
        ([3, -1], [0, 1], [0, 0], "an id that the embedding does not have"),
        ([3, 4], [0, 2], [0, 0], "a row that the cache does not have"),
        ([3, 4], [0, 1], [0, 9], "a place beyond the cache's end"),
        ([3, 4], [0, 1], [0, -1], "a place beyond the cache's end"),
    ],
)
def test_a_token_outside_is_refused_before_anything_is_written(model, ids, row, at, words):
    weights, table, c = NativeTransformer(model), table_of(model), model.config
    block = torch.full((2, 2, c.layers, c.kv_heads, 9, c.head_dim), float("nan"))
    rows = Sequences(weights, table, [(own, None) for own in block])
    with pytest.raises(IndexError, match=words):
        rows.run(*map(torch.tensor, (ids, row, at)))
    assert block.isnan().all()
    rows.run(*map(torch.tensor, ([3, 4], [0, 1], [0, 0])))
    assert not block[:, :, :, :, 0].isnan().any() and block[:, :, :, :, 1:].isnan().all()


@pytest.mark.parametrize("columns", [1, 3, 64, 65, 1000, 1024])
def test_noise_is_that_of_the_kernels_to_the_last_bit(tiny, columns):
    generator = torch.Generator().manual_seed(columns)
    draw = torch.randint(1 << 32, (3, 5), generator=generator)
    position = torch.randint(1 << 32, (3, 1), generator=generator)
    for seed in (0, 7, 0x9E3779B97F4A7C15 >> 1, (1 << 63) - 1):
        found = gumbel_noise(seed, draw, position, columns)
        assert torch.equal(found, philox.gumbel_noise(seed, draw, position, columns))
    with pytest.raises(ValueError, match="seed"):
        gumbel_noise(-1, draw, position, columns)


@torch.inference_mode()
def test_what_torch_makes_by_default_is_not_what_is_written_to(tiny, defaults):
    """Writing to a buffer of another type or device than the library's would hit foreign memory."""
    weights, table, cpu = NativeTransformer(tiny.transformer), tiny.code_table, torch.device("cpu")
    prompts = [prompt(9, 0), prompt(5, 1)]
    ids, pads = left_padded(prompts, PAD)
    codes, draw = torch.tensor([[3, 5], [4, 6]]), torch.arange(2)
    cache = WindowCache(weights.config, 2, T, torch.float32, cpu)

    def everything() -> list[Tensor]:
        decoding = NativeDecoding(weights, table, ids, pads, T, guided=False)
        found = [decoding.prefill(), decoding.step(codes[:, 0]), decoding.window(codes, [1, 0])]
        rows = NativeRows(weights, table, cache)
        rows.hold(0, rows.run_prompts([prompts[0]])[0])
        found.append(rows.step(codes[0], torch.zeros_like(draw) + rows._lengths, 0))
        return [*found, gumbel_noise(7, draw, draw, 1000)]

    wanted = everything()
    defaults()
    for found, before in zip(everything(), wanted, strict=True):
        assert found.dtype == torch.float32 and found.device == cpu
        assert torch.equal(found, before)


# --- where it cannot be ---------------------------------------------------------------------------


def codes_of(engine: Engine) -> Tensor:
    from echogen.engine.layout import Layout, LayoutObject

    layout = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.6, 0.7)),))
    return engine.generate_codes([layout], 5, decoding="sequential")


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler", r"no C\+\+ compiler \(no-such-compiler\) is on PATH"),
        ("false", r"false failed: without a word; name another one in CXX"),
        ("no-program", r"no-program failed: Exec format error; name another one in CXX"),
    ],
)
def test_without_a_compiler_the_same_is_drawn_with_a_warning(
    tiny, untried, tmp_path, compiler, words
):
    wanted = codes_of(tiny)
    loader._library.cache_clear()
    if compiler == "no-program":
        (tmp_path / compiler).write_bytes(b"\0")
        (tmp_path / compiler).chmod(0o700)
        compiler = str(tmp_path / compiler)
    untried.setenv("CXX", compiler)
    untried.setenv("ECHOGEN_CACHE", str(tmp_path))
    engine = copy.copy(tiny)
    engine.refresh()
    with pytest.warns(UserWarning, match=words):
        assert isinstance(engine.decoder, PackedTransformer)
    assert torch.equal(codes_of(engine), wanted)


def test_a_folder_that_cannot_be_made_is_named(tiny, untried, tmp_path):
    (tmp_path / "file").touch()
    untried.setenv("ECHOGEN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="file.*; name a folder that can be written to in ECHO"):
        packed(tiny.transformer)


def test_a_user_without_a_home_is_told_what_to_name(tiny, untried):
    """For example a user that a container knows only by number."""
    for name in ("HOME", "ECHOGEN_CACHE"):
        untried.delenv(name, raising=False)
    untried.setattr("os.getuid", lambda: (1 << 31) - 7)
    with pytest.warns(UserWarning, match="no home folder.*; name a folder.* in ECHOGEN_CACHE"):
        packed(tiny.transformer)


@pytest.mark.parametrize("left", [b"", b"\0" * 4096])
def test_a_library_never_written_out_is_made_anew(tiny, untried, tmp_path, monkeypatch, left):
    """A machine leaves such a library if it stops right after the compiler."""
    untried.setenv("ECHOGEN_CACHE", str(tmp_path))
    with monkeypatch.context() as stopping:
        stopping.setattr(loader, "_compile", lambda _, built: built.write_bytes(left) and built)
        assert isinstance(why_not_native(tiny.transformer), loader.CompilerError)
    (built,) = (tmp_path / "native").iterdir()
    assert built.read_bytes() == left
    loader._library.cache_clear()
    assert why_not_native(tiny.transformer) is None


def test_words_behind_the_compilers_name_are_passed_on(tiny, untried, tmp_path):
    """CXX may hold what build tools allow: "ccache g++", or an option."""
    tool, *_ = loader.compiler()
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "c++").symlink_to(tool)
    untried.setenv("ECHOGEN_CACHE", str(tmp_path))
    for asked in (f"env {tool} -pipe", str(folder / "c++")):
        untried.setenv("CXX", asked)
        loader._library.cache_clear()
        assert why_not_native(tiny.transformer) is None
    assert len(list((tmp_path / "native").iterdir())) == 2


def test_it_is_compiled_once(untried, tmp_path, monkeypatch):
    untried.setenv("ECHOGEN_CACHE", str(tmp_path))
    if loader.compiler() is None:
        pytest.skip("no compiler")
    loader.library("transformer")
    (built,) = (tmp_path / "native").iterdir()
    loader._library.cache_clear()
    monkeypatch.setattr(loader, "_compile", lambda *_: pytest.fail("compiled again"))
    assert loader.library("transformer").echogen_lanes() in (4, 8, 16)
    assert list((tmp_path / "native").iterdir()) == [built]


@pytest.mark.parametrize("cpu", ["native", "x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_it_compiles_without_a_warning_for_any_cpu(cpu):
    tool = loader.compiler()
    if tool is None or (cpu != "native" and platform.machine() != "x86_64"):
        pytest.skip("no compiler for it")
    options = [*loader.OPTIONS, "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only"]
    source = loader.FOLDER / "transformer.cpp"
    done = subprocess.run(
        [*tool, *options, f"-march={cpu}", str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's OpenMP is GNU's on Linux")
def test_threads_are_pytorchs_whatever_is_imported_first(tiny):
    probe = "from echogen.engine.cpu.loader import library as l\n"
    probe += "raise SystemExit(not l('transformer').echogen_threaded())"
    env = os.environ | {"PYTHONPATH": str(Path(echogen.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", probe], env=env, check=False).returncode == 0


def test_it_can_be_switched_off_without_a_word(tiny, monkeypatch):
    monkeypatch.setenv("ECHOGEN_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(packed(tiny.transformer), PackedTransformer)
    monkeypatch.setenv("ECHOGEN_NATIVE", "no")
    with pytest.raises(loader.SwitchError, match="ECHOGEN_NATIVE=no: write 0"):
        packed(tiny.transformer)


def test_other_types_go_through_pytorch(tiny):
    assert "bfloat16 on cpu" in str(why_not_native(copy.deepcopy(tiny.transformer).bfloat16()))


def test_a_large_model_on_many_threads_goes_through_pytorch(tiny, threads, monkeypatch):
    monkeypatch.setattr("echogen.engine.cpu.native.CACHED_BYTES", 1 << 20)
    threads(2)
    assert why_not_native(tiny.transformer) is None
    threads(3)
    assert "more than the 1 a cache may hold" in str(why_not_native(tiny.transformer))
    monkeypatch.undo()
    assert why_not_native(tiny.transformer) is None


@torch.inference_mode()
def test_threads_that_share_products_change_no_bit(model, threads, monkeypatch):
    """As a large model is run: also on more threads than there are heads or blocks of outputs, and
    for prompts, of which only the last token is answered."""
    prompts = [[BOS, *range(2, 2 + n), BEGIN] for n in (3, 7, 3, 1)]
    ids, pads = left_padded(prompts, PAD)
    codes = torch.randint(16, (len(prompts), 5), generator=torch.Generator().manual_seed(1))

    def drawn() -> Tensor:
        weights = NativeTransformer(model)
        decoding = NativeDecoding(weights, table_of(model), ids, pads, T, False)
        first = decoding.prefill()
        return torch.cat((first[:, None], decoding.window(codes, [0] * len(prompts))), 1)

    if not loader.library("transformer").echogen_threaded():
        pytest.skip("there is one thread here")
    threads(1)
    wanted = drawn()
    monkeypatch.setattr("echogen.engine.cpu.native.CACHED_BYTES", 0)
    for count in (1, 2, 3, *[7] * 20):  # many times, as a meeting that is missing rarely shows
        threads(count)
        assert torch.equal(drawn(), wanted)
