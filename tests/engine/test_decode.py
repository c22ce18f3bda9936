"""Drawing matches the port's greedy loop and the uncached forward, and samples as documented."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from echogen.engine.cache import KVCache, Prefix, PrefixCache
from echogen.engine.checkpoints.weights import load_checkpoint
from echogen.engine.cpu.packed import PackedTransformer, packable
from echogen.engine.cpu.packed_decode import PackedDecoding
from echogen.engine.decoding.decode import PlainDecoding, decode_image, left_padded
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.model import additive_mask
from echogen.kernels.philox import gumbel_noise

BOS, EOS, PAD, BEGIN = 1, 2, 0, 58
GREEDY = Sampling(temperature=0)
SHAPES = {
    "plain": {},
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "tied": {"tied": True, "num_hidden_layers": 3},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory, janus_config, random_janus):
    """A port model, and its transformer as the engine loads it."""
    port = random_janus(janus_config(**SHAPES[request.param]), seed=20)
    folder = tmp_path_factory.mktemp("checkpoint")
    port.save_pretrained(folder)
    return port, load_checkpoint(folder).transformer


@pytest.fixture
def model(pair):
    return pair[1]


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(3, BEGIN, (length - 2,), generator=generator).tolist()
    return [BOS, *middle, BEGIN]


def unconditional(ids: list[int]) -> list[int]:
    return [BOS, *[PAD] * (len(ids) - 2), BEGIN]


def draw(model, prompts, sampling=GREEDY, seed=0, draws=None, sampler=Sampler) -> Tensor:
    """Codes of ``prompts``; the unconditional rows are added here."""
    c = model.config
    ids = torch.arange(len(prompts)) if draws is None else torch.tensor(draws)
    rows = prompts if sampling.cfg == 1 else prompts + [unconditional(p) for p in prompts]
    made = sampler(sampling, seed, ids, c.codebook_size, c.image_tokens)
    with torch.no_grad():
        table = model.code_table()
    return decode_image(model, table, rows, made, PAD)


class Recorder(Sampler):
    """Keeps the logits of every step."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seen: list[Tensor] = []
        Recorder.last = self

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        self.seen.append(logits.clone())
        return super().__call__(logits, step)


@torch.inference_mode()
def full_logits(model, ids: list[int], codes: Tensor) -> Tensor:
    """Image logits of every code of one image, by one forward without a cache."""
    embedded = torch.cat(
        (model.embed_text(torch.tensor([ids])), model.embed_codes(codes[None, :-1])), 1
    )
    length = embedded.shape[1]
    mask = additive_mask(torch.ones(1, length, length, dtype=torch.bool).tril(), embedded.dtype)
    hidden = model(embedded, torch.arange(length), mask)
    return model.image_head(hidden[0, len(ids) - 1 :])


# --- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("seed, rows, length", [(0, 1, 5), (1, 3, 9), (2, 2, 17)])
def test_greedy_guided_codes_are_the_ports(pair, seed, rows, length, cache):
    port, model = pair
    prompts = [prompt(length, 100 * seed + i) for i in range(rows)]
    ids = torch.tensor(prompts)
    total = length + model.config.image_tokens
    past = (
        DynamicCache(config=port.config.text_config)
        if cache == "dynamic"
        else StaticCache(config=port.config.text_config, max_cache_len=total)
    )
    # transformers renamed it in 5.24 or a little before.
    names = inspect.signature(port.forward).parameters
    taken = "cache" if "cache" in names else "past_key_values"
    wanted = port.generate(
        inputs=ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        generation_config=GenerationConfig(
            do_sample=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            generation_kwargs={"boi_token_id": BEGIN},
        ),
        guidance_scale=5.0,
        max_length=total,
        **{taken: past},
    )
    found = draw(model, prompts, Sampling(temperature=0, cfg=5.0))
    assert torch.equal(found, wanted)
    assert len(found.unique()) > 3  # a constant image would prove little


def test_greedy_codes_without_guidance_are_those_of_the_uncached_forward(model):
    prompts = [prompt(7, seed) for seed in range(3)]
    found = draw(model, prompts)
    for ids, row in zip(prompts, found, strict=True):
        codes = torch.zeros(0, dtype=torch.int64)
        for _ in range(model.config.image_tokens):
            nothing = torch.zeros(1, dtype=torch.int64)
            logits = full_logits(model, ids, torch.cat((codes, nothing)))
            codes = torch.cat((codes, logits[-1:].argmax(-1)))
        assert torch.equal(codes, row)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 9, 5)], ids=["even", "ragged"])
def test_decoding_logits_are_those_of_the_uncached_forward(model, relative_error, lengths, cfg):
    prompts = [prompt(n, seed) for seed, n in enumerate(lengths)]
    codes = draw(model, prompts, Sampling(temperature=0, cfg=cfg), sampler=Recorder)
    steps = torch.stack(Recorder.last.seen, 1)
    rows = prompts if cfg == 1 else prompts + [unconditional(p) for p in prompts]
    assert len(steps) == len(rows)
    for i, ids in enumerate(rows):
        wanted = full_logits(model, ids, codes[i % len(prompts)])
        assert relative_error(steps[i], wanted) < 1e-5


@torch.inference_mode()
def test_a_cached_forward_in_pieces_is_the_whole(model, relative_error):
    generator = torch.Generator().manual_seed(3)
    embedded = torch.randn(2, 15, model.config.width, generator=generator)
    whole = additive_mask(torch.ones(1, 15, 15, dtype=torch.bool).tril(), torch.float32)
    wanted = model(embedded, torch.arange(15), whole)
    cache, pieces = KVCache(model.config, 2, 15), []
    for first, last in ((0, 6), (6, 10), (10, 11), (11, 12), (12, 15)):
        pieces.append(
            model(
                embedded[:, first:last],
                torch.arange(first, last),
                whole[:, :, first:last, :last] if last - first > 1 else None,
                cache,
            )
        )
    assert relative_error(torch.cat(pieces, 1), wanted) < 1e-5
    with pytest.raises(ValueError, match="larger capacity"):
        model(embedded[:, :1], torch.arange(1), None, cache)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 2), (4, 11)])
@torch.inference_mode()
def test_packed_weights_decode_as_the_plain_ones(pair, relative_error, dtype, bound, lengths):
    """With and without padding, and with one or two rows per code."""
    model = copy.deepcopy(pair[1]).to(dtype)
    if not packable(model):
        pytest.skip(f"oneDNN cannot pack {dtype} here")
    table = model.code_table()
    ids, pads = left_padded([prompt(n, seed) for seed, n in enumerate(lengths)], PAD)
    decodings = [
        PlainDecoding(model, table, ids, pads, 16),
        PackedDecoding(PackedTransformer(model), table, ids, pads, 16, guided=False),
    ]
    wanted, packed = (d.prefill() for d in decodings)
    assert relative_error(packed, wanted) < bound
    for code in (torch.tensor([3]), torch.tensor([1]), torch.tensor([5, 2]), torch.tensor([0, 7])):
        wanted, packed = (d.step(code) for d in decodings)
        assert relative_error(packed, wanted) < bound


def test_kept_prefixes_change_nothing(model):
    """One packed model, which keeps unconditional prefixes, draws what fresh ones draw; a prefix
    beyond the budget is dropped."""
    c, sampling = model.config, Sampling(temperature=0, cfg=4.0)
    if not packable(model):
        pytest.skip("oneDNN cannot pack this model here")
    packed = PackedTransformer(model)
    for seed, lengths in enumerate([(7,), (9,), (7,), (9, 4), (4, 9)]):
        prompts = [prompt(n, 10 * seed + i) for i, n in enumerate(lengths)]
        rows = prompts + [unconditional(p) for p in prompts]
        sampler = Sampler(sampling, 0, torch.arange(len(prompts)), c.codebook_size, c.image_tokens)
        codes = decode_image(packed, model.code_table().detach(), rows, sampler, PAD)
        assert torch.equal(codes, draw(model, prompts, sampling))

    ids, pads = left_padded([prompt(7, 0), prompt(4, 1), *[unconditional(prompt(7, 0))] * 2], PAD)
    table = model.code_table().detach()
    with torch.inference_mode():
        decodings = [PackedDecoding(packed, table, ids, pads, 16, guided=True) for _ in range(2)]
        assert torch.equal(*(d.prefill() for d in decodings))
        assert torch.equal(*(d.step(torch.tensor([1, 2])) for d in decodings))

    held = PrefixCache(budget=3 * 72)
    for i in range(5):
        held.put((i,), Prefix(torch.zeros(16), torch.zeros(2)))
    held.put((5,), Prefix(torch.zeros(53), torch.zeros(2)))
    there = [False, False, True, True, True, False]
    assert [held.get((i,)) is not None for i in range(6)] == there
    assert held.get((2,)) is not None
    held.put((6,), Prefix(torch.zeros(16), torch.zeros(2)))
    assert held.get((3,)) is None and held.get((2,)) is not None, "the one used longest ago goes"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(cfg=4.0), Sampling(top_k=5)])
def test_ragged_prompts_draw_what_each_draws_alone(model, sampling):
    prompts = [prompt(n, seed) for seed, n in enumerate((2, 11, 5, 8))]
    together = draw(model, prompts, sampling, seed=3, draws=[4, 5, 6, 7])
    for i, ids in enumerate(prompts):
        alone = draw(model, [ids], sampling, seed=3, draws=[4 + i])
        assert torch.equal(alone[0], together[i])


def test_shorter_unconditional_prompts(model):
    """PlanGen's unconditional prompt is shorter than the conditional ones beside it."""
    c, prompts, empty = model.config, [prompt(9, 0), prompt(6, 1)], prompt(4, 2)
    sampling = Sampling(temperature=0, cfg=5.0)

    def codes(rows: list[list[int]]) -> Tensor:
        sampler = Sampler(sampling, 0, torch.arange(len(rows) // 2), c.codebook_size, 16)
        return decode_image(model, model.code_table().detach(), rows, sampler, PAD)

    together = codes([*prompts, empty, empty])
    for i, ids in enumerate(prompts):
        assert torch.equal(codes([ids, empty])[0], together[i])
        conditional, other = (full_logits(model, p, together[i]) for p in (ids, empty))
        assert torch.equal((other + 5 * (conditional - other)).argmax(-1), together[i])


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(cfg=3.0, temperature=0.8, top_p=0.9)])
def test_codes_do_not_depend_on_the_batch(model, sampling):
    prompts = [prompt(6, seed) for seed in range(4)]
    draws = [10, 3, 77, 2**32 - 1]
    together = draw(model, prompts, sampling, seed=8, draws=draws)
    order = [2, 0, 3, 1]
    shuffled = draw(model, [prompts[i] for i in order], sampling, 8, [draws[i] for i in order])
    assert torch.equal(shuffled, together[order])
    assert torch.equal(draw(model, prompts[1:2], sampling, 8, draws[1:2])[0], together[1])


def test_seed_and_draw_decide_the_codes(model):
    prompts = [prompt(6, 0)] * 3
    codes = draw(model, prompts, Sampling(), seed=1)
    assert torch.equal(draw(model, prompts, Sampling(), seed=1), codes)
    assert not torch.equal(draw(model, prompts, Sampling(), seed=2), codes)
    assert len(codes.unique(dim=0)) == 3
    assert ((codes >= 0) & (codes < model.config.codebook_size)).all()


def test_progress_is_told_of_every_step(model):
    told, c = [], model.config
    sampler = Sampler(GREEDY, 0, torch.arange(1), c.codebook_size, c.image_tokens)
    table = model.code_table().detach()
    decode_image(model, table, [prompt(4, 0)], sampler, PAD, lambda *s: told.append(s))
    assert told == [(i, 16) for i in range(1, 17)]


V, DRAWS = 7, 20_000
COND = torch.tensor([1.5, 0.2, -0.4, 0.9, -2.0, 0.5, 1.1])
UNCOND = torch.tensor([0.3, 0.8, -0.1, -0.7, 0.4, 0.0, 1.0])


def stated(sampling: Sampling) -> list[float]:
    """The documented distribution, code by code in plain Python floats."""
    guided = [
        u + sampling.cfg * (c - u) for c, u in zip(COND.tolist(), UNCOND.tolist(), strict=True)
    ]
    weights = torch.tensor(guided, dtype=torch.float64).div(sampling.temperature).exp().tolist()
    ranked = sorted(range(V), key=lambda i: -weights[i])
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(V)]


@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0, cfg=3.0), Sampling(cfg=0.0),
    Sampling(top_k=3), Sampling(cfg=2.0, top_k=1), Sampling(top_p=0.7), Sampling(top_p=1e-6),
    Sampling(temperature=1.3, cfg=1.5, top_k=5, top_p=0.8), Sampling(top_k=99),
])  # fmt: skip
def test_draws_follow_the_stated_distribution(sampling):
    logits = COND.expand(DRAWS, V)
    if sampling.cfg != 1:
        logits = torch.cat((logits, UNCOND.expand(DRAWS, V)))
    sampler = Sampler(sampling, 5, torch.arange(DRAWS), V, 4)
    counts = torch.stack([sampler(logits, s).bincount(minlength=V) for s in range(2)]).sum(0)
    wanted = torch.tensor(stated(sampling), dtype=torch.float64)
    kept = wanted > 0
    assert counts[~kept].sum() == 0
    if kept.sum() > 1:
        test = stats.chisquare(counts[kept].numpy(), (wanted[kept] * counts.sum()).numpy())
        assert test.pvalue > 0.001


def test_noise_is_keyed_by_position_however_the_steps_are_visited(monkeypatch):
    """Blocks of positions are an implementation detail: their size and order change nothing."""
    logits, draws = COND.expand(6, V), torch.arange(6) + 40
    wanted = {
        step: (logits + gumbel_noise(5, draws, torch.tensor(step), V)).argmax(-1)
        for step in range(10)
    }
    for block in (1, 6 * V * 3, 1 << 21):
        monkeypatch.setattr(Sampler, "BLOCK", block)
        for order in (range(10), reversed(range(10)), (0, 4, 8, 1, 9, 9, 0, 7)):
            sampler = Sampler(Sampling(), 5, draws, V, 10)
            for step in order:
                assert torch.equal(sampler(logits, step), wanted[step])


@pytest.mark.parametrize("block", [1, 6 * V * 3, 1 << 21])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(cfg=2.0, top_k=4, top_p=0.8)])
def test_several_positions_at_once_draw_what_each_draws_alone(monkeypatch, sampling, block):
    """Every sample is at positions of its own; noise is made in blocks of one, three or all of
    them."""
    monkeypatch.setattr(Sampler, "BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    rows = 6 if sampling.cfg == 1 else 12
    logits = torch.randn(rows, 10, V, generator=generator)
    sampler = Sampler(sampling, 5, torch.arange(6) + 40, V, 10)
    wanted = torch.stack([sampler(logits[:, step], step) for step in range(10)], 1)
    for width in (1, 4, 10):
        first = torch.randint(0, 11 - width, (6, 1), generator=generator)
        positions = first + torch.arange(width)
        at = positions.repeat(rows // 6, 1)
        scores = sampler.scores(logits[torch.arange(rows)[:, None], at])
        assert torch.equal(sampler.pick(scores, positions), wanted.gather(1, positions))


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": float("nan")}, {"cfg": -0.5}, {"cfg": float("inf")},
    {"cfg": 1e39}, {"cfg_start": 1e39, "cfg_schedule": "linear"},
    {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")},
    {"unconditional": "none"},
])  # fmt: skip
def test_settings_that_make_no_distribution_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
