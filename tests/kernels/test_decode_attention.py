"""Decode attention against a float64 softmax over concatenated caches that uses no project code.
What lies behind a cache's length is NaN throughout."""

from __future__ import annotations

import math

import pytest
import torch

from echogen.kernels import decode_attention as module
from echogen.kernels import decode_members as gathering
from echogen.kernels import dispatch
from echogen.kernels.decode_attention import Splits, decode_attention
from echogen.kernels.decode_members import decode_members
from echogen.kernels.rope import scaled_heads

HEADS = [(1, 1), (3, 3), (6, 2)]
EIGHT = torch.float8_e4m3fn
GROUPS = {
    "uneven": [3, 0, -1, 3, 3, 0, 3, 3, 4, 3, 9],  # nobody continues 1 and 2
    "one": [0] * 11,
    "none": [-1] * 11,
}


class Fixed(Splits):
    """Always as many splits."""

    def of(self, programs: int, keys: int) -> int:
        return self.least


@pytest.fixture
def cut(monkeypatch):
    """Sets the number of splits; every loop of the kernels but that over keys takes small steps."""
    monkeypatch.setattr(module, "MERGED", 2)
    monkeypatch.setattr(gathering, "SCANNED", 4)
    return lambda splits: monkeypatch.setattr(module, "SPLITS", Fixed(0, splits))


def cache(count, heads, capacity, width, lengths, generator, device, dtype):
    made = [torch.randn(count, heads, capacity, width, generator=generator) for _ in range(2)]
    for tensor in made:
        for row, length in zip(tensor, lengths, strict=True):
            row[:, length:] = float("nan")
    return [tensor.to(device, dtype) for tensor in made]


def own(lengths, heads, capacity, width, generator, device, dtype=torch.float32):
    """Query, keys, values and lengths of a call."""
    query = 2 * torch.randn(len(lengths), heads[0], width, generator=generator)
    keys = cache(len(lengths), heads[1], capacity, width, lengths, generator, device, dtype)
    return query.to(device, dtype), *keys, torch.tensor(lengths, device=device)


def prefix(lengths, groups, heads, capacity, width, generator, device, dtype=torch.float32):
    """Prefix keys, values, lengths and groups of a call."""
    keys = cache(len(lengths), heads[1], capacity, width, lengths, generator, device, dtype)
    return *keys, torch.tensor(lengths, device=device), torch.tensor(groups, device=device)


def oracle(query, keys, values, lengths, shared=None, scale=None):
    out = torch.zeros_like(query, dtype=torch.float64)
    sequences, heads, width = query.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    for b in range(sequences):
        for h in range(heads):
            at = h // (heads // keys.shape[1])
            parts = [[t[b, at, : lengths[b]].double() for t in (keys, values)]]
            if shared is not None and 0 <= shared[3][b] < len(shared[0]):
                g = int(shared[3][b])
                parts.insert(0, [t[g, at, : shared[2][g]].double() for t in shared[:2]])
            k, v = (torch.cat(column) for column in zip(*parts, strict=True))
            if len(k):
                out[b, h] = (scale * k @ query[b, h].double()).softmax(0) @ v
    return out


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("width", [32, 64, 128, 24])
@pytest.mark.parametrize("splits", [1, 3, 7])
def test_ragged_lengths(heads, width, splits, cut, generator, device, relative_error):
    cut(splits)
    inputs = own([203, 0, 1, 131, 64], heads, 203, width, generator, device)
    found = decode_attention(*inputs)
    assert relative_error(found, oracle(*inputs)) < 2e-6
    assert (found[1] == 0).all()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("splits", [1, 3])
def test_shared_prefixes(heads, groups, splits, cut, generator, device, relative_error):
    cut(splits)
    lengths = [5, 0, 0, 71, 1, 33, 0, 2, 16, 3, 1]
    inputs = own(lengths, heads, 71, 32, generator, device)
    shared = prefix([109, 7, 0, 97, 1], GROUPS[groups], heads, 109, 32, generator, device)
    wanted = oracle(*inputs, shared)
    found = decode_attention(*inputs, None, *shared)
    assert relative_error(found, wanted) < 2e-6
    assert torch.equal((found == 0).all(-1), (wanted == 0).all(-1))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [2, 16, 19])  # of several tiles, too
@pytest.mark.parametrize("splits", [1, 3])
def test_windows(heads, window, splits, cut, generator, device, relative_error):
    """Queries of one sequence, each with an end of its own: as of as many sequences."""
    cut(splits)
    held, groups = [150, 0, window, 71], [1, 0, -1, 1]
    query, keys, values, _ = own(held, heads, 150, 32, generator, device)
    query = torch.randn(len(held) * window, *query.shape[1:], generator=generator).to(device)
    ends = [[max(0, n - window + 1 + w) for w in range(window)] for n in held]
    lengths = torch.tensor(ends, device=device).flatten()
    each = [t.repeat_interleave(window, 0) for t in (keys, values)]
    found = decode_attention(query, keys, values, lengths)
    assert relative_error(found, oracle(query, *each, lengths)) < 2e-6
    shared = prefix([61, 100], groups, heads, 100, 32, generator, device)
    shared = (*shared[:3], shared[3].repeat_interleave(window))
    found = decode_attention(query, keys, values, lengths, None, *shared)
    wanted = oracle(query, *each, lengths, shared)
    assert relative_error(found, wanted) < 2e-6
    order = decode_members(shared[3], query, shared[0])
    assert torch.equal(decode_attention(query, keys, values, lengths, None, *shared, order), found)
    assert torch.equal((found == 0).all(-1), (wanted == 0).all(-1))


def test_a_window_in_8_bits(generator, device, relative_error):
    held, window = [40, 9], 4
    _, keys, values, _ = own(held, (2, 1), 40, 32, generator, device)
    query = torch.randn(8, 2, 32, generator=generator).to(device)
    lengths = torch.tensor([37, 38, 39, 40, 6, 7, 8, 9], device=device)
    eight, scales, meant = in_8_bits(keys, values, held)
    found = decode_attention(query, *eight, lengths, scales=scales)
    each = [t.repeat_interleave(window, 0) for t in meant]
    assert relative_error(found, oracle(query, *each, lengths)) < 2e-3


def in_8_bits(keys, values, lengths):
    """A cache in 8 bits with its scales, both NaN behind the lengths, and what it stands for."""
    held, scales = zip(*(scaled_heads(t.nan_to_num()) for t in (keys, values)), strict=True)
    meant = [h.float() * s[..., None] for h, s in zip(held, scales, strict=True)]
    scales = torch.stack(scales)
    # Of the leading rows of a cache that has one more.
    scales = torch.cat([scales, scales[:, :1]], 1)[:, :-1]
    for row, length in enumerate(lengths):
        scales[:, row, :, length:] = float("nan")
        for tensor in (*held, *meant):
            tensor[row, :, length:] = float("nan")
    return held, scales, meant


@pytest.mark.parametrize("heads", HEADS[1:])
@pytest.mark.parametrize("splits", [1, 3])
def test_8_bits(heads, splits, cut, generator, device, relative_error):
    """Exact, but for products in float16, for what the 8 bits and their scales stand for, which is
    near what was scaled."""
    cut(splits)
    lengths = [5, 0, 0, 71, 1, 33, 0, 2, 16, 3, 1]
    query, keys, values, *rest = own(lengths, heads, 71, 32, generator, device)
    before = prefix([109, 7, 0, 97, 1], GROUPS["uneven"], heads, 109, 32, generator, device)
    held, scales, meant = in_8_bits(keys, values, lengths)
    prefix_held, prefix_scales, prefix_meant = in_8_bits(*before[:2], [109, 7, 0, 97, 1])
    found = decode_attention(query, *held, *rest, scales=scales)
    assert relative_error(found, oracle(query, *meant, *rest)) < 2e-3
    assert relative_error(found, oracle(query, keys, values, *rest)) < 0.08
    more = {"scales": scales, "prefix_scales": prefix_scales}
    found = decode_attention(query, *held, *rest, None, *prefix_held, *before[2:], **more)
    wanted = oracle(query, *meant, *rest, (*prefix_meant, *before[2:]))
    assert relative_error(found, wanted) < 2e-3
    assert torch.equal((found == 0).all(-1), (wanted == 0).all(-1))


@pytest.mark.parametrize("size", [1e-3, 4e5])
def test_8_bits_of_values_far_from_one(size, generator, device, relative_error):
    query, keys, values, lengths = own([71, 5], (6, 2), 71, 64, generator, device)
    values *= size / values.nan_to_num().abs().amax()
    held, scales, meant = in_8_bits(keys, values, [71, 5])
    found = decode_attention(query, *held, lengths, scales=scales)
    assert relative_error(found, oracle(query, *meant, lengths)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_8_bits_of_half_types(dtype, cut, generator, device, relative_error):
    cut(3)
    inputs = own([71, 5], (6, 2), 71, 64, generator, device, dtype)
    held, scales, meant = in_8_bits(*inputs[1:3], [71, 5])
    found = decode_attention(inputs[0], *held, inputs[3], scales=scales)
    wanted = oracle(inputs[0], *meant, inputs[3])
    assert found.dtype == dtype and relative_error(found, wanted) < 1e-2


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("where", ["query", "key", "prefix"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy says what it sees
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(where, splits, value, cut, generator, device):
    """Neither zeros, nor what was in memory before, where a model has diverged."""
    cut(splits)
    query, keys, values, lengths = own([150, 0, 40], (1, 1), 150, 16, generator, device)
    before = prefix([109], [0, 0, -1], (1, 1), 109, 16, generator, device)
    broken = {"query": query[0], "key": keys[0, :, 3], "prefix": before[0][0, :, 100]}[where]
    broken[0, 0] = value
    if math.isinf(value):
        broken[0, 0] *= 1.0 if query[0, 0, 0] > 0 else -1.0  # a score of +inf, not −inf
    found = decode_attention(query, keys, values, lengths, None, *before)
    assert found[0].isnan().any()
    assert found[2].isfinite().all()


def test_more_sequences_than_a_tile(cut, generator, device, relative_error):
    cut(2)
    groups = torch.randint(-1, 3, (75,), generator=generator).tolist()
    lengths = torch.randint(0, 6, (75,), generator=generator).tolist()
    for heads in [(1, 1), (5, 1)]:
        inputs = own(lengths, heads, 5, 16, generator, device)
        shared = prefix([40, 3, 41], groups, heads, 41, 16, generator, device)
        found = decode_attention(*inputs, None, *shared)
        assert relative_error(found, oracle(*inputs, shared)) < 2e-6


@pytest.mark.parametrize("heads", [(1, 1), (5, 1)])
def test_members_found_once_serve_every_call(heads, cut, generator, device):
    """The same order as each call would find, and the same result to the last bit."""
    cut(2)
    groups = torch.randint(-1, 4, (75,), generator=generator).tolist()
    inputs = own([3] * 75, heads, 5, 16, generator, device)
    shared = prefix([40, 3, 41], groups, heads, 41, 16, generator, device)
    order = decode_members(shared[3], inputs[0], shared[0])
    first = decode_attention(*inputs, None, *shared)
    assert torch.equal(decode_attention(*inputs, None, *shared, order), first)


def test_prefixes_are_full_without_lengths(generator, device, relative_error):
    inputs = own([3, 1], (2, 2), 4, 16, generator, device)
    keys, values, lengths, groups = prefix([6, 6], [1, 0], (2, 2), 6, 16, generator, device)
    found = decode_attention(*inputs, None, keys, values, None, groups)
    wanted = oracle(*inputs, (keys, values, lengths, groups))
    assert relative_error(found, wanted) < 2e-6


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_types(dtype, bound, cut, generator, device, relative_error):
    cut(3)
    inputs = own([301, 0, 65], (4, 2), 301, 64, generator, device, dtype)
    shared = prefix([131, 64], [1, 0, 1], (4, 2), 131, 64, generator, device, dtype)
    found = decode_attention(*inputs, None, *shared)
    assert found.dtype == dtype
    assert relative_error(found, oracle(*inputs, shared)) < bound
    assert relative_error(decode_attention(*inputs), oracle(*inputs)) < bound


def test_scores_far_apart_and_another_scale(cut, generator, device, relative_error):
    """e^x of these scores overflows, and whole splits weigh nothing."""
    cut(3)
    query, keys, values, lengths = own([97, 97], (2, 2), 97, 32, generator, device)
    inputs = (100 * query, keys, values, lengths)
    found = decode_attention(*inputs, 3.0)
    # A weight is off by as much, relatively, as its score is in absolute terms.
    terms = torch.einsum("bhd,bhld->bhl", inputs[0].abs(), inputs[1].abs())
    bound = 3.0 * float(terms.max()) * torch.finfo(torch.float32).eps
    assert bound < 1e-2 and relative_error(found, oracle(*inputs, scale=3.0)) < bound


def test_lengths_in_any_integers_and_beyond_the_capacity(generator, device):
    query, keys, values, lengths = own([9, 0, 4], (2, 1), 9, 16, generator, device)
    found = decode_attention(query, keys, values, lengths)
    beyond = torch.tensor([2**40, -(2**40), 4], device=device)
    assert torch.equal(decode_attention(query, keys, values, lengths.int()), found)
    assert torch.equal(decode_attention(query, keys, values, beyond), found)


def test_repeated_calls_are_bit_equal(cut, generator, device):
    cut(3)
    inputs = own([150, 80, 11], (4, 2), 150, 32, generator, device)
    shared = prefix([61], [0, 0, 0], (4, 2), 61, 32, generator, device)
    first = decode_attention(*inputs, None, *shared)
    assert torch.equal(decode_attention(*inputs, None, *shared), first)


def test_sequences_do_not_depend_on_the_batch(cut, generator, device):
    """Bit-equal in the kernels; a CPU's matrix products differ in rounding with their shapes."""
    cut(3)
    close = {"rtol": 0, "atol": 0} if dispatch.INTERPRETED or device == "cuda" else {}
    inputs = own([150, 0, 11, 99, 64], (4, 2), 150, 32, generator, device)
    shared = prefix([61, 100], [0, 1, 0, -1, 1], (4, 2), 100, 32, generator, device)
    whole = decode_attention(*inputs, None, *shared)
    for one in range(5):
        alone = [tensor[one : one + 1] for tensor in inputs]
        group = shared[3][one : one + 1]
        found = decode_attention(*alone, None, *shared[:3], group)
        torch.testing.assert_close(found[0], whole[one], **close)
    order = torch.randperm(5, generator=generator).to(device)
    moved = [tensor[order] for tensor in inputs]
    found = decode_attention(*moved, None, *shared[:3], shared[3][order])
    torch.testing.assert_close(found, whole[order], **close)


def test_splits_fill_the_device_and_keep_a_tile_of_keys_each():
    splits = Splits(programs=396, least=64)
    assert splits.of(1024, 704) == 1  # 64 sequences of 16 heads
    assert splits.of(128, 704) == 4
    assert splits.of(32, 704) == 11  # 2 sequences: no more than there are tiles
    assert splits.of(16, 30) == 1


def test_opcheck(generator, device):
    inputs = own([9, 4, 0], (2, 1), 9, 16, generator, device)
    shared = prefix([5, 3], [1, 0, 1], (2, 1), 5, 16, generator, device)
    for tensor in (*inputs[1:3], *shared[:2]):
        tensor.nan_to_num_()
    operator = torch.ops.echogen.decode_attention.default
    torch.library.opcheck(operator, (*inputs, 0.25, *shared))
    torch.library.opcheck(operator, (*inputs, 0.25, None, None, None, None))
    order = decode_members(shared[3], inputs[0], shared[0])
    torch.library.opcheck(operator, (*inputs, 0.25, *shared, order))
    held, scales, _ = in_8_bits(*inputs[1:3], [9, 9, 9])
    before, more, _ = in_8_bits(*shared[:2], [5, 5])
    rest = (*before, *shared[2:], order, scales, more)
    # The schema's test multiplies what it is given, which no CPU does in 8 bits.
    eight = (inputs[0], *held, inputs[3], 0.25, *rest)
    torch.library.opcheck(operator, eight, test_utils="test_faketensor")


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts launches of interpreted kernels")
def test_the_kernels_are_entered(generator, device, launched, monkeypatch):
    inputs = own([9, 4], (2, 1), 9, 16, generator, device)
    monkeypatch.setattr(module, "SPLITS", Splits(programs=1))
    decode_attention(*inputs)
    assert launched == {"_decode_own_kernel": 1}, "a single split needs no merging"
    launched.clear()
    decode_attention(*inputs, None, *prefix([5], [0, 0], (2, 1), 5, 16, generator, device))
    assert launched == {f"_decode_{name}_kernel": 1 for name in ("members", "shared", "merge")}
    launched.clear()
    shared = prefix([5], [0, 0], (2, 1), 5, 16, generator, device)
    order = decode_members(shared[3], inputs[0], shared[0])
    for _ in range(3):
        decode_attention(*inputs, None, *shared, order)
    assert launched["_decode_members_kernel"] == 1 and launched["_decode_shared_kernel"] == 3


def test_bad_arguments(device):
    rows = torch.ones(2, dtype=torch.int64, device=device)
    good = {
        "query": torch.zeros(2, 4, 16, device=device),
        "keys": torch.zeros(2, 2, 5, 16, device=device),
        "values": torch.zeros(2, 2, 5, 16, device=device),
        "lengths": rows,
        "prefix_keys": torch.zeros(3, 2, 7, 16, device=device),
        "prefix_values": torch.zeros(3, 2, 7, 16, device=device),
        "prefix_lengths": torch.ones(3, dtype=torch.int32, device=device),
        "groups": rows,
    }
    order = decode_members(rows, good["query"], good["prefix_keys"])
    decode_attention(**good, order=order)
    names = ("keys", "values", "prefix_keys", "prefix_values")
    eight = {name: good[name].to(EIGHT) for name in names}
    eight["scales"] = torch.zeros(2, 2, 2, 5, device=device)
    eight["prefix_scales"] = torch.zeros(2, 3, 2, 7, device=device)
    decode_attention(**good | eight)
    wide = {name: torch.zeros(2, 2, 5, 130, device=device) for name in ("keys", "values")}
    crossed = torch.zeros(2, 5, 2, 16, device=device).transpose(1, 2)
    for change, match in [
        ({"query": good["query"][0]}, r"query has shape \(4, 16\)"),
        ({"query": good["query"].long()}, "query is torch.int64"),
        ({"query": good["query"].bfloat16()}, "keys is torch.float32 and query torch.bfloat16"),
        ({"query": good["query"][:, :3].contiguous()}, "3 heads and keys 2"),
        ({"query": torch.zeros(2, 34, 16, device=device)}, "34 heads and keys 2"),
        ({"query": torch.zeros(2, 4, 130, device=device)} | wide, "130 wide"),
        ({"query": good["query"][:0], "keys": good["keys"][:0], "values": good["values"][:0],
          "lengths": rows[:0]}, "query has shape .* must not be empty"),
        ({"keys": good["keys"][:, :, :0], "values": good["values"][:, :, :0]}, "keys has shape"),
        ({"keys": good["keys"][..., :8]}, "keys has shape"),
        ({"keys": crossed}, "keys has strides"),
        ({"query": torch.zeros(3, 4, 16, device=device), "lengths": rows[[0, 0, 0]]},
         "3 rows for the 2 sequences"),
        ({"values": good["values"][:, :, :4]}, "values has shape"),
        ({"lengths": rows[:1]}, "lengths has shape"),
        ({"lengths": rows.float()}, "lengths is torch.float32"),
        ({"scale": float("inf")}, "scale = inf"),
        ({"prefix_keys": good["prefix_keys"][:, :1]}, "prefix_keys has shape"),
        ({"prefix_keys": good["prefix_keys"].half()}, "prefix_keys is torch.float16"),
        ({"prefix_keys": good["prefix_keys"][:0], "prefix_values": good["prefix_values"][:0],
          "prefix_lengths": rows[:0]}, "prefix_keys has shape .* must not be empty"),
        ({"prefix_values": good["prefix_values"][:2]}, "prefix_values has shape"),
        ({"prefix_lengths": rows}, "prefix_lengths has shape"),
        ({"groups": rows[:1]}, "groups has shape"),
        ({"groups": rows.float()}, "groups is torch.float32"),
        ({"groups": None}, "only prefix_keys and prefix_values and prefix_lengths given"),
        ({"prefix_keys": None, "prefix_values": None, "prefix_lengths": None}, "only groups given"),
        ({"prefix_values": None, "prefix_lengths": None}, "only prefix_keys and groups given"),
        ({"order": order[1:]}, "order has shape"),
        ({"order": order.long()}, "order is torch.int64"),
        ({"order": order, "prefix_keys": None, "prefix_values": None, "prefix_lengths": None,
          "groups": None}, "order is given without a prefix"),
        ({"keys": good["keys"].to(EIGHT)}, "keys is torch.float8_e4m3fn, which needs scales"),
        ({"scales": torch.zeros(2, 2, 2, 5, device=device)}, "with scales it must be"),
        (eight | {"scales": eight["scales"][:1]}, "scales has shape"),
        (eight | {"scales": eight["scales"].double()}, "scales is torch.float64"),
        (eight | {"prefix_scales": None}, "prefix_keys is .*, which needs prefix_scales"),
        (eight | {"prefix_scales": eight["prefix_scales"][:, 1:]}, "prefix_scales has shape"),
        ({"scales": eight["scales"], "keys": eight["keys"], "values": eight["values"]},
         "prefix_keys is torch.float32 and keys torch.float8"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=match):
            decode_attention(**good | change)
