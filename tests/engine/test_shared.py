"""A prompt's keys and values kept once for its group draw what copies of them draw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from echogen.engine import decode
from echogen.engine.decode import decode_image, left_padded
from echogen.engine.packed import PackedTransformer, packable
from echogen.engine.packed_decode import PackedDecoding
from echogen.engine.packed_shared import Section, SharedDecoding, sections, worth_sharing
from echogen.engine.sampler import Sampler, Sampling
from echogen.engine.weights import load_checkpoint

BOS, PAD, BEGIN, T = 1, 0, 58, 16
SHAPES = {"plain": {}, "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2}}


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request, tmp_path_factory, janus_config, random_janus):
    port = random_janus(janus_config(**SHAPES[request.param]), seed=22)
    folder = tmp_path_factory.mktemp("checkpoint")
    port.save_pretrained(folder)
    transformer = load_checkpoint(folder).transformer
    if not packable(transformer):
        pytest.skip("oneDNN cannot pack this model here")
    return transformer


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(3, BEGIN, (length - 2,), generator=generator).tolist()
    return [BOS, *middle, BEGIN]


def groups(*sizes_and_lengths: tuple[int, int]) -> list[list[int]]:
    """Of each (size, length) a group of that many rows with a prompt of its own."""
    return [
        prompt(length, seed)
        for seed, (size, length) in enumerate(sizes_and_lengths)
        for _ in range(size)
    ]


EVEN = groups((4, 7), (4, 7), (4, 7))
RAGGED = groups((4, 5), (4, 9), (2, 3), (2, 9), (1, 6))
AWAY = groups((1, 4)) * 12


@pytest.mark.parametrize(
    ("rows", "guided"), [(EVEN, False), (RAGGED, False), (EVEN + AWAY, True)],
    ids=["even", "ragged", "guided"],
)  # fmt: skip
@torch.inference_mode()
def test_logits_are_those_of_copies(model, relative_error, rows, guided):
    packed, table = PackedTransformer(model), model.code_table()
    ids, pads = left_padded(rows, PAD)
    made = (packed, table, ids, pads, T, guided)
    both = PackedDecoding(*made), SharedDecoding(*made)
    generator = torch.Generator().manual_seed(1)
    found = [d.prefill() for d in both]
    assert torch.equal(*found)
    for _ in range(T - 1):
        code = torch.randint(24, (len(rows) // (1 + guided),), generator=generator)
        wanted, shared = (d.step(code) for d in both)
        assert relative_error(shared, wanted) < 1e-5


def draw(model, rows: list[list[int]], draws: list[int], sampling: Sampling) -> Tensor:
    c = model.config
    sampler = Sampler(sampling, 3, torch.tensor(draws), c.codebook_size, T)
    with torch.no_grad():
        return decode_image(model, model.code_table(), rows, sampler, PAD)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(cfg=3.0, temperature=0.7)])
def test_a_group_draws_what_each_of_it_draws_alone(model, sampling, monkeypatch):
    used = []
    monkeypatch.setenv("ECHOGEN_NATIVE", "0")
    monkeypatch.setattr(
        decode, "SharedDecoding", lambda *a: used.append(len(a[2])) or SharedDecoding(*a)
    )
    rows = groups((8, 7), (8, 4))
    away = [[BOS, PAD, BEGIN]]
    guided = away * len(rows) if sampling.guided else []
    together = draw(model, rows + guided, list(range(16)), sampling)
    assert used == [16 + len(guided)]
    for i in (0, 7, 8, 13):
        alone = draw(model, [rows[i], *guided[:1]], [i], sampling)
        assert torch.equal(alone[0], together[i])
    assert len(used) == 1 and len(together.unique(dim=0)) == 16


def test_rows_fall_into_sections_of_equal_groups():
    ids = torch.tensor([[1], [1], [2], [2], [3], [3], [3], [4]])
    assert sections(ids) == [Section(0, 2, 2), Section(4, 1, 3), Section(7, 1, 1)]
    assert list(sections(ids)[0].leaders) == [0, 2] and sections(ids)[-1].end == 8


def test_what_is_shared():
    def ids(*sizes: int) -> Tensor:
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[:, None]

    assert worth_sharing(ids(8, 8), torch.float32)
    assert worth_sharing(ids(*[8] * 8, 64), torch.float32)  # with unconditional rows
    assert not worth_sharing(ids(8, 8), torch.bfloat16)
    assert not worth_sharing(ids(8), torch.float32)  # few rows
    assert not worth_sharing(ids(*[2] * 16), torch.float32)  # few of each
    assert not worth_sharing(ids(8, 9, 8, 9, 8), torch.float32)  # in disorder


@torch.inference_mode()
def test_a_prompts_tokens_are_held_once(model):
    ids, pads = left_padded(EVEN, PAD)
    shared = SharedDecoding(PackedTransformer(model), model.code_table(), ids, pads, T, False)
    assert shared.held == 3 * 7
