"""Guided sampling, against a float64 distribution that uses no project code."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.kernels import aot, dispatch, sampling
from echogen.kernels.philox import gumbel_noise
from echogen.kernels.sampling import cfg_sample

SHAPES = [(1, 1, 1), (3, 7, 2), (19, 389, 37), (17, 300, 16)]
"""Samples, codes, width: ones, primes, and several blocks with a ragged tail on every axis."""
SETTINGS = {
    "plain": {},
    "guided": {"cfg": 3.0, "temperature": 0.7},
    "top-k": {"top_k": 5, "temperature": 1.3},
    "top-p": {"top_p": 0.8},
    "all": {"cfg": 2.5, "temperature": 1.7, "top_k": 9, "top_p": 0.7},
}
NONE = float("-inf")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks small enough for the shapes above to span three on every axis."""
    monkeypatch.setattr(sampling, "ROWS", 8)
    monkeypatch.setattr(sampling, "COLUMNS", 256)  # half of it with four warps
    monkeypatch.setattr(sampling, "EMBED", 16)


@pytest.fixture
def many_rows(monkeypatch):
    """A thousand rows per program, so that interpreted statistics take seconds; on a GPU the kernel
    is tested as it is launched."""
    if dispatch.INTERPRETED:
        monkeypatch.setattr(sampling, "ROWS", 1024)


def inputs(shape, generator, device, dtype=torch.float32):
    """Logits of both branches [2, N, V], table [V, D], draw and position [N]."""
    samples, codes, width = shape
    logits = 2 * torch.randn(2, samples, codes, generator=generator)
    table = torch.randn(codes, width, generator=generator)
    draw = torch.randint(0, 2**32, (samples,), generator=generator)
    position = torch.randint(0, 576, (samples,), generator=generator)
    return *(t.to(device, dtype) for t in (logits, table)), draw.to(device), position.to(device)


def sample(logits, draw, position, cfg=1.0, seed=5, **settings):
    """Through the layout that the scale needs, from both branches [2, N, V]."""
    if cfg == 1:
        return cfg_sample(logits[0], seed, draw, position, **settings)
    rows = logits.flatten(0, 1)
    return cfg_sample(rows, seed, draw, position, cfg, guided="blocked", **settings)


def oracle(logits, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """Log-probabilities float64 [N, V], and the rows whose truncation float32 cannot tip."""
    c, u = logits.double()
    x = (u + cfg * (c - u)) / temperature
    sure = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if 0 < top_k < x.shape[1]:
        ordered = x.sort(-1, descending=True).values
        sure &= ordered[:, top_k - 1] - ordered[:, top_k] > 1e-4
        x = torch.where(x < ordered[:, top_k - 1, None], NONE, x)
    if top_p < 1:
        p = x.softmax(-1)
        above = torch.stack([(p * (p > p[:, i, None])).sum(-1) for i in range(p.shape[1])], 1)
        sure &= (above - top_p).abs().amin(-1) > 1e-5
        x = torch.where(above >= top_p, NONE, x)
    return x.log_softmax(-1), sure


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_token_logprob_and_embedding(shape, settings, generator, device, small_blocks):
    logits, table, draw, position = inputs(shape, generator, device)
    found = sample(logits, draw, position, table=table, **settings)
    truth, sure = oracle(logits, **settings)
    noisy = truth + gumbel_noise(5, draw, position, shape[1]).double()
    if shape[1] > 1:
        best = noisy.topk(2).values
        sure &= best[:, 0] - best[:, 1] > 1e-4
    assert int(sure.sum()) >= 0.8 * len(sure) - 1
    assert torch.equal(found.token[sure], noisy.argmax(-1)[sure])
    wanted = truth.gather(1, found.token[:, None])[:, 0]
    torch.testing.assert_close(found.logprob[sure].double(), wanted[sure], rtol=1e-5, atol=1e-5)
    assert found.logprob.dtype == torch.float32
    assert torch.equal(found.embed, table[found.token])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype, generator, device, small_blocks):
    """Converted, then as in float32."""
    logits, table, draw, position = inputs((9, 300, 37), generator, device, dtype)
    found = sample(logits, draw, position, table=table, **SETTINGS["all"])
    wanted = sample(logits.float(), draw, position, table=table.float(), **SETTINGS["all"])
    assert torch.equal(found.token, wanted.token) and torch.equal(found.logprob, wanted.logprob)
    assert found.embed.dtype == dtype and torch.equal(found.embed, table[found.token])


def frequencies(logits, draws, generator, device, **settings):
    """Counts [V] of ``draws`` samples of one row, which must fit its exact distribution."""
    codes = logits.shape[-1]
    truth, sure = oracle(logits, **settings)
    if not sure:
        return
    first = int(torch.randint(0, 2**31, (), generator=generator))
    draw = first + torch.arange(draws, device=device)
    position = torch.full_like(draw, 3)
    found = sample(logits.expand(2, draws, codes).contiguous(), draw, position, **settings)
    wanted = draws * truth[0].exp().cpu()
    counts = found.token.bincount(minlength=codes).cpu().double()
    assert (counts[wanted == 0] == 0).all()
    rare = wanted < 5
    bins = [torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts, wanted)]
    bins = [t[bins[1] > 0] for t in bins]
    if len(bins[0]) > 1:
        assert chisquare(*(t.numpy() for t in bins)).pvalue > 1e-7


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frequencies(settings, generator, device, many_rows):
    logits, *_ = inputs((1, 13, 1), generator, device)
    frequencies(logits / 2, 20_000, generator, device, **settings)


@pytest.mark.skipif(dispatch.INTERPRETED, reason="V = 16,384 takes minutes interpreted")
def test_frequencies_of_peaked_logits_over_the_codebook(generator, device):
    logits, *_ = inputs((1, 16384, 1), generator, device)
    peaks = torch.randint(0, 16384, (24,), generator=generator).to(device)
    logits[:, :, peaks] += 11
    draws = 1000 if device == "cpu" else 20_000
    frequencies(logits, draws, generator, device)
    frequencies(logits, draws // 2, generator, device, temperature=1.2, top_k=40)


def test_probabilities_of_all_tokens_sum_to_one(generator, device, many_rows):
    logits, *_ = inputs((1, 11, 1), generator, device)
    draw = torch.arange(4096, device=device)
    for settings in SETTINGS.values():
        many = (logits / 4).expand(2, 4096, 11).contiguous()
        found = sample(many, draw, torch.zeros_like(draw), **settings)
        seen = [found.logprob[found.token == i].unique() for i in range(11)]
        assert all(len(values) <= 1 for values in seen)
        truth, sure = oracle(logits / 4, **settings)
        rest = sum(float(truth[0, i].exp()) for i in range(11) if len(seen[i]) == 0)
        total = float(torch.cat(seen).double().exp().sum())
        assert not sure or total == pytest.approx(1 - rest, abs=1e-5)


@pytest.mark.parametrize("settings", ["guided", "all"])
def test_rows_do_not_depend_on_the_batch(settings, generator, device):
    """Nor on the run: all is bit-equal."""
    settings = SETTINGS[settings]
    logits, _, draw, position = inputs((7, 67, 1), generator, device)
    whole = sample(logits, draw, position, **settings)
    order = torch.randperm(7, generator=generator).to(device)
    for part in (order, torch.tensor([4], device=device), torch.arange(7, device=device)):
        found = sample(logits[:, part].contiguous(), draw[part], position[part], **settings)
        assert torch.equal(found.token, whole.token[part])
        assert torch.equal(found.logprob, whole.logprob[part])


def test_layouts_agree(generator, device, small_blocks):
    logits, table, draw, position = inputs((9, 70, 4), generator, device)
    key = {"seed": 1, "draw": draw, "position": position, "table": table}
    blocked, interleaved = logits.flatten(0, 1), logits.transpose(0, 1).flatten(0, 1).contiguous()
    for cfg, top_k in [(4.0, 0), (4.0, 6), (0.0, 0)]:
        one = cfg_sample(blocked, cfg=cfg, top_k=top_k, guided="blocked", **key)
        other = cfg_sample(interleaved, cfg=cfg, top_k=top_k, guided="interleaved", **key)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    alone = cfg_sample(logits[1], **key)
    assert all(torch.equal(a, b) for a, b in zip(one, alone, strict=True))  # s = 0


def test_a_scale_of_one_reads_no_unconditional_row(generator, device):
    logits, _, draw, position = inputs((5, 40, 1), generator, device)
    logits[1] = float("nan")
    wanted = cfg_sample(logits[0].clone(), 1, draw, position)
    for found in (
        cfg_sample(logits.flatten(0, 1)[:5], 1, draw, position),
        cfg_sample(logits.flatten(0, 1), 1, draw, position, guided="blocked"),
        cfg_sample(logits.transpose(0, 1).flatten(0, 1).contiguous(), 1, draw, position,
                   guided="interleaved"),
    ):  # fmt: skip
        assert torch.equal(found.token, wanted.token)
        assert torch.equal(found.logprob, wanted.logprob)
        assert torch.isfinite(found.logprob).all() and found.embed.shape == (5, 0)


def test_greedy(generator, device, small_blocks):
    logits, table, draw, position = inputs((9, 300, 3), generator, device)
    logits = logits.round()  # ties: the first of them
    for settings in ({}, {"cfg": 3.0}, {"top_k": 4, "top_p": 0.5}):
        found = sample(logits, draw, position, temperature=0.0, table=table, **settings)
        x = logits[0] if "cfg" not in settings else logits[1] + 3 * (logits[0] - logits[1])
        first = (x == x.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(found.token, first)
        assert torch.equal(found.logprob, torch.zeros_like(found.logprob))
        assert torch.equal(found.embed, table[first])


def test_ties_with_the_last_code_kept_are_kept(device, many_rows):
    row = torch.tensor([1.0, 3.0, -0.0, 1.0, 0.0, 3.0, 1.0, -2.0], device=device)
    draw = torch.arange(2048, device=device)
    for settings, kept in [
        ({"top_k": 1}, {1, 5}),
        ({"top_k": 3}, {0, 1, 3, 5, 6}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5, 6}),
        ({"top_k": 8}, set(range(8))),
        ({"top_k": 100}, set(range(8))),
        ({"top_p": 1e-30}, {1, 5}),
        ({"top_p": 0.6}, {1, 5}),
        ({"top_p": 0.85}, {0, 1, 3, 5, 6}),
        ({"top_k": 3, "top_p": 0.85}, {0, 1, 3, 5, 6}),
        ({"top_p": 0.68}, {0, 1, 3, 5, 6}),
        ({"top_k": 3, "top_p": 0.68}, {1, 5}),  # 0.717 after top-k, 0.646 before
    ]:
        found = sample(row.expand(2, 2048, 8).contiguous(), draw, draw, temperature=1.5, **settings)
        probability = (row / 1.5).exp()
        probability /= probability[sorted(kept)].sum()
        assert set(found.token.tolist()) <= kept
        drawn = probability[found.token].log()
        torch.testing.assert_close(found.logprob, drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("above", [1.0, 0.7, -0.3])
def test_thresholds_are_exact_to_the_last_bit(above, device, many_rows):
    above = torch.tensor(above, device=device)
    below = torch.nextafter(above, torch.tensor(NONE, device=device))
    logits = torch.stack([below, above, below]).expand(2, 256, 3).contiguous()
    draw = torch.arange(256, device=device)
    for settings in ({"top_k": 1}, {"top_p": 0.2}):
        assert (sample(logits, draw, draw, **settings).token == 1).all()
    assert len(sample(logits, draw, draw, top_k=2).token.unique()) == 3


def test_a_tiny_top_p_keeps_the_most_likely_code(generator, device):
    logits, _, draw, position = inputs((6, 40, 1), generator, device)
    for top_p in (1e-3, 1e-40, torch.zeros(1, device=device)):
        found = sample(logits, draw, position, top_p=top_p)
        assert torch.equal(found.token, logits[0].argmax(-1))
        assert torch.equal(found.logprob, torch.zeros_like(found.logprob))


@pytest.mark.parametrize("top_k", [0, 1, 17, 300, 1000])
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_tokens_are_the_sampler_s(top_k, cfg, generator, device):
    logits, _, draw, _ = inputs((6, 300, 1), generator, device)
    drawn = Sampling(temperature=0.8, cfg=cfg, top_k=top_k)
    rows = logits[0] if cfg == 1 else logits.flatten(0, 1)
    wanted = Sampler(drawn, 11, draw, 300, 9)(rows, 7)
    position = torch.full_like(draw, 7)
    found = sample(logits, draw, position, cfg, 11, temperature=0.8, top_k=top_k)
    assert torch.equal(found.token, wanted)


def test_codes_of_no_probability_are_never_drawn(generator, device, small_blocks):
    logits, _, draw, position = inputs((40, 300, 1), generator, device)
    allowed = torch.rand(300, generator=generator).to(device) < 0.1
    allowed[-1] = True
    for branch in (0, 1):
        masked = logits.clone()
        masked[branch, :, ~allowed] = NONE
        for settings in ({"cfg": 3.0}, {"cfg": 0.0, "top_k": 200, "top_p": 0.999}):
            found = sample(masked, draw, position, **settings)
            assert allowed[found.token].all() and torch.isfinite(found.logprob).all()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("value", [NONE, float("nan")])
def test_rows_without_a_distribution(value, settings, generator, device):
    """Token in range, log-probability NaN; the other rows are untouched."""
    logits, table, draw, position = inputs((3, 37, 2), generator, device)
    good = sample(logits, draw, position, table=table, **settings)
    logits[:, 1] = value
    found = sample(logits, draw, position, table=table, **settings)
    assert 0 <= int(found.token[1]) < 37 and torch.isnan(found.logprob[1])
    for a, b in zip(good, found, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"temperature": 0.0}])
def test_one_nan_spoils_its_row(settings, generator, device, small_blocks):
    """Also in the last, ragged tile, whose padding may win a maximum that drops NaN."""
    logits, table, draw, position = inputs((3, 389, 2), generator, device)
    good = sample(logits, draw, position, table=table, **settings)
    logits[0, 1, -1] = float("nan")
    found = sample(logits, draw, position, table=table, **settings)
    assert 0 <= int(found.token[1]) < 389 and found.logprob[1].isnan()
    for a, b in zip(good, found, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.skipif(dispatch.INTERPRETED, reason="numpy finds no maximum among nothing but NaN")
def test_a_temperature_that_is_nan_is_not_hidden(generator, device):
    logits, _, draw, position = inputs((3, 37, 2), generator, device)
    heat = torch.tensor([float("nan")], device=device)
    assert sample(logits, draw, position, temperature=heat).logprob.isnan().all()


def test_numbers_may_be_tensors(generator, device):
    logits, _, draw, position = inputs((5, 67, 1), generator, device)
    numbers = {"cfg": 2.5, "temperature": 0.7, "top_p": 0.6}
    tensors = {k: torch.tensor([v], device=device) for k, v in numbers.items()}
    rows, seed = logits.flatten(0, 1), torch.tensor([5], device=device)
    wanted = cfg_sample(rows, 5, draw, position, guided="blocked", **numbers)
    found = cfg_sample(rows, seed, draw.int(), position, guided="blocked", **tensors)
    assert torch.equal(found.token, wanted.token) and torch.equal(found.logprob, wanted.logprob)
    for top_k in (0, 5):
        wanted = sample(logits, draw, position, top_k=top_k)
        for top_p in (1.0, 1.5):  # what is above 1 counts as 1
            top_p = torch.tensor([top_p], device=device)
            all_kept = sample(logits, draw, position, top_k=top_k, top_p=top_p)
            torch.testing.assert_close(all_kept.logprob, wanted.logprob, rtol=1e-5, atol=1e-5)
    cold = sample(logits, draw, position, temperature=torch.zeros(1, device=device))
    assert torch.equal(cold.token, logits[0].argmax(-1)) and (cold.logprob == 0).all()


@pytest.mark.skipif(dispatch.INTERPRETED, reason="what a GPU would run is recorded")
@pytest.mark.parametrize("top_k", [0, 5])
def test_the_scores_are_rounded_before_they_are_compared(top_k, generator):
    """On a GPU a product and a sum may be one operation, with one rounding. The interpreter does
    not, so that its tests would not notice."""
    logits, _, draw, position = inputs((5, 67, 1), generator, torch.device("cpu"))
    with dispatch.recorded() as found:
        sample(logits, draw, position, temperature=0.1, top_k=top_k)
    assert [aot.Source.of(launch).options["enable_fp_fusion"] for launch in found] == [False]


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("nucleus", [False, True])
def test_every_row_may_have_numbers_of_its_own(nucleus, top_k, generator, device, small_blocks):
    """In one launch what as many give, to the bit."""
    count = 11
    logits, table, draw, position = inputs((count, 300, 3), generator, device)
    numbers = {
        "seed": torch.randint(0, 2**62, (count,), generator=generator),
        "cfg": 4 * torch.rand(count, generator=generator).round(decimals=1),
        "temperature": 0.2 + torch.rand(count, generator=generator),
    }
    if nucleus:
        numbers["top_p"] = 0.1 + 0.8 * torch.rand(count, generator=generator)
    numbers = {name: t.to(device) for name, t in numbers.items()}
    numbers["cfg"][3] = 1.0
    rows = logits.flatten(0, 1)
    key = {"draw": draw, "position": position}
    found = cfg_sample(rows, **key, guided="blocked", top_k=top_k, table=table, **numbers)
    for n in range(count):
        own = {name: t[n : n + 1] for name, t in (numbers | key).items()}
        alone = cfg_sample(
            logits[:, n].contiguous(), guided="blocked", top_k=top_k, table=table, **own
        )
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(found, alone, strict=True))


def test_as_many_numbers_as_rows(generator, device):
    logits, _, draw, position = inputs((5, 67, 1), generator, device)
    for numbers in ({"temperature": 1 + torch.rand(3)}, {"seed": torch.arange(4)}):
        numbers = {name: t.to(device) for name, t in numbers.items()}
        with pytest.raises(ValueError, match="one for each of 5 rows"):
            sample(logits, draw, position, **numbers)


def test_more_than_two_to_the_31_elements(device):
    if device != "cuda":
        pytest.skip("needs 5 GB of GPU memory")
    rows = (1 << 17) + 3
    logits = torch.zeros(rows, 16384, dtype=torch.bfloat16, device=device)
    logits[-1, 77] = 50
    draw = torch.arange(rows, device=device)
    table = torch.arange(16384, device=device).float()[:, None].expand(-1, 8).contiguous()
    for settings in ({}, {"top_k": 5}):
        found = cfg_sample(logits, 0, draw, draw, table=table, **settings)
        assert int(found.token[-1]) == 77 and float(found.embed[-1, -1]) == 77


def test_opcheck(generator, device):
    logits, table, draw, position = inputs((3, 40, 8), generator, device)
    one, seed = torch.ones(1, device=device), torch.ones(1, dtype=torch.int64, device=device)
    operator = torch.ops.echogen.cfg_sample.default
    key = (logits.flatten(0, 1), seed, draw, position)
    torch.library.opcheck(operator, (*key, table, 3 * one, one, 5, 0.5 * one, "interleaved"))
    torch.library.opcheck(operator, (*key, None, None, None, 0, None, "blocked"))


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_one_launch(generator, device, launched):
    logits, table, draw, position = inputs((3, 9, 2), generator, device)
    for settings in SETTINGS.values():
        launched.clear()
        sample(logits, draw, position, table=table, **settings)
        assert launched == {"_cfg_sample_kernel": 1}


def test_nothing_has_a_gradient(generator, device):
    logits, table, draw, position = inputs((2, 9, 2), generator, device)
    found = sample(logits.requires_grad_(), draw, position, table=table.requires_grad_())
    assert not any(t.requires_grad for t in found)


def test_bad_arguments(device):
    rows = torch.arange(4, device=device)
    logits, table = torch.zeros(4, 6, device=device), torch.zeros(6, 2, device=device)
    good = {"logits": logits, "seed": 0, "draw": rows, "position": rows}
    guided = {"guided": "blocked", "draw": rows[:2], "position": rows[:2]}
    cfg_sample(**good)
    cfg_sample(**good | guided)
    long = torch.zeros(4, 65537, device=device)
    cfg_sample(**good | {"logits": long, "temperature": 0.0, "top_k": 5})
    for change, match in [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"temperature": torch.ones(2, device=device)}, "temperature has shape"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"cfg": 2.0}, "cfg = 2.0; without unconditional rows"),
        ({"cfg": torch.ones(1, device=device)}, "without unconditional rows"),
        (guided | {"cfg": -1.0}, "cfg = -1.0"),
        (guided | {"cfg": float("nan")}, "cfg = nan"),
        (guided | {"logits": logits[:3]}, "3 rows"),
        ({"guided": "mixed"}, "guided = 'mixed'"),
        ({"guided": "blocked"}, "draw has shape"),
        ({"seed": -1}, "seed = -1"),
        ({"logits": logits[None]}, "logits has shape"),
        ({"logits": torch.zeros(6, 4, device=device).T}, "strides"),
        ({"logits": logits.long()}, "logits is torch.int64"),
        ({"logits": logits[:, :0]}, "must not be empty"),
        ({"draw": rows[:3]}, "draw has shape"),
        ({"draw": rows.float()}, "draw is torch.float32"),
        ({"position": rows[None]}, "position has shape"),
        ({"position": rows.bool()}, "position is torch.bool"),
        ({"table": table[:5]}, "table has shape"),
        ({"table": table.int()}, "table is torch.int32"),
        ({"table": torch.zeros(2, 6, device=device).T}, "strides"),
        ({"table": table.to("meta")}, "several devices"),
        ({"logits": long, "top_k": 5}, "65537 columns"),
        ({"logits": long, "top_p": 0.5}, "65537 columns"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            cfg_sample(**good | change)
