"""The agreement of policy gradients: what is compared, and what is refused."""

from __future__ import annotations

import pytest

from echogen.bench.quality import credit


def test_halves_are_compared_for_both_credits() -> None:
    seen = []
    found = credit.run(rollouts=2, batch=1, progress=lambda *done: seen.append(done))
    assert [row["credit"] for row in found["results"]] == ["image", "object"]
    for row in found["results"]:
        assert -1 <= row["cosine"] <= 1
        least = row["rollouts_for_half"]
        assert (least is None) == (row["cosine"] <= 0)
        assert least is None or least == pytest.approx((1 - row["cosine"]) / row["cosine"])
    assert seen[-1] == (4, 4)


def test_an_odd_number_is_refused() -> None:
    with pytest.raises(ValueError, match="rollouts = 3"):
        credit.run(rollouts=3)
