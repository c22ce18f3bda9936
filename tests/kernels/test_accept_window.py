"""A drawing in windows against lists of codes, taken one after another."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels.accept_window import accept_window

PROMPTS = [7, 3, 12, 5, 2, 9]


class Image:
    """One image, as a person would draw it: final codes, and a draft that grows when needed."""

    def __init__(self, first: int, tokens: int, columns: int) -> None:
        self.codes, self.done, self.steps = [first], 1, 0
        self.drafted, self.columns = [False] * tokens, columns

    def window(self, width: int) -> tuple[int, list[int]]:
        start = min(self.done, len(self.drafted) - width)
        while len(self.codes) < start + width:
            above = len(self.codes) - self.columns
            self.codes.append(self.codes[above if above >= 0 else -1])
        return start, self.codes[start - 1 : start - 1 + width]

    def take(self, start: int, samples: list[int]) -> None:
        if self.done == len(self.drafted):
            return
        self.steps += 1
        begin, right = self.done, True
        for at in range(begin, start + len(samples)):
            sample = samples[at - start]
            if right:
                self.done, right = at + 1, self.codes[at] == sample
            self.codes[at] = sample
        for at in range(begin, self.done - 1):
            self.drafted[at] = True


class State:
    """What the operator writes, for images that have drawn their first codes."""

    def __init__(self, first, tokens, width, branches, device):
        images = len(first)
        whole = {"dtype": torch.int64, "device": device}
        self.codes = torch.tensor(first, **whole)[:, None].repeat(1, tokens)
        self.drafted = torch.zeros(images, tokens, dtype=torch.bool, device=device)
        self.done, self.steps = torch.ones(images, **whole), torch.zeros(images, **whole)
        self.fed, self.position = torch.full((2, images * width), -9, **whole)
        self.places = torch.full((3, branches * images * width), -9, **whole)
        self.origin = torch.tensor(PROMPTS[: branches * images], **whole)

    def step(self, sampled, columns):
        accept_window(
            sampled, self.codes, self.drafted, self.done, self.steps, self.fed, self.position,
            self.places, self.origin, columns,
        )  # fmt: skip


@pytest.mark.parametrize(("columns", "branches"), [(1, 2), (3, 1), (5, 2), (8, 1)])
@pytest.mark.parametrize(("tokens", "width"), [(17, 4), (17, 8), (9, 8), (11, 1), (28, 19)])
@pytest.mark.parametrize("kinds", [2, 9])  # drafts are often right, or hardly ever
def test_whole_drawings(tokens, width, columns, branches, kinds, generator, device):
    first = torch.randint(kinds, (3,), generator=generator).tolist()
    images = [Image(code, tokens, columns) for code in first]
    state = State(first, tokens, width, branches, device)
    starts = [image.window(width)[0] for image in images]
    while any(image.done < tokens for image in images):
        rows = torch.randint(kinds, (3, width), generator=generator)
        for n, (image, start) in enumerate(zip(images, starts, strict=True)):
            for w in range(image.done - start):  # a code that is final is drawn again
                rows[n, w] = image.codes[start + w]
        state.step(rows.flatten().to(device), columns)
        for image, start, row in zip(images, starts, rows.tolist(), strict=True):
            image.take(start, row)
        starts, ran = map(list, zip(*(image.window(width) for image in images), strict=True))
        assert state.done.tolist() == [image.done for image in images]
        assert state.steps.tolist() == [image.steps for image in images]
        assert state.drafted.tolist() == [image.drafted for image in images]
        assert state.fed.view(3, width).tolist() == ran
        at = torch.tensor(starts)[:, None] + torch.arange(width)
        assert torch.equal(state.position.cpu(), at.flatten())
        slots, seen, turned = state.places.cpu().view(3, branches, 3, width)
        assert torch.equal(slots, (at - 1).expand_as(slots)) and torch.equal(seen, slots + 1)
        prompts = torch.tensor(PROMPTS[: 3 * branches]).view(branches, 3, 1)
        assert torch.equal(turned, slots + prompts)
        for n, image in enumerate(images):
            assert state.codes[n, : len(image.codes)].tolist() == image.codes
    assert state.codes.tolist() == [image.codes for image in images]


def test_rows_without_a_prompt_stay_where_they_are(device):
    state = State([4, 5], 9, 3, 1, device)
    state.origin[1], state.done[1] = -1, 9
    before = state.codes[1].clone()
    state.step(torch.tensor([4, 4, 4, 6, 6, 6], device=device), 3)
    assert state.places.view(3, 2, 3)[:, 1].eq(-9).all() and state.done.tolist() == [4, 9]
    assert torch.equal(state.codes[1], before) and not state.drafted[1].any()


def test_opcheck(device):
    s = State([4, 5], 9, 3, 2, device)
    sampled = torch.tensor([4, 4, 4, 5, 6, 6], device=device)
    torch.library.opcheck(
        torch.ops.echogen.accept_window.default,
        (sampled, s.codes, s.drafted, s.done, s.steps, s.fed, s.position, s.places, s.origin, 3),
    )


def test_bad_arguments(device):
    s = State([4, 5], 9, 3, 2, device)
    names = ("codes", "drafted", "done", "steps", "fed", "position", "places", "origin")
    good = {name: getattr(s, name) for name in names} | {"columns": 3}
    good["sampled"] = torch.zeros(6, dtype=torch.int64, device=device)
    accept_window(**good)
    for change, match in [
        ({"sampled": good["sampled"].int()}, "sampled is torch.int32"),
        ({"sampled": good["sampled"][:5]}, "sampled has 5 codes for 2 images"),
        ({"sampled": good["sampled"].repeat(3)}, r"as many for each, 1 … 8"),
        ({"codes": s.codes[0]}, "codes has shape"),
        ({"codes": s.codes.t().contiguous().t()}, "codes has strides"),
        ({"drafted": s.drafted.long()}, "drafted is torch.int64"),
        ({"done": s.done[:1]}, "done has shape"),
        ({"fed": s.fed[:3]}, "fed has shape"),
        ({"places": s.places[:2]}, "places has shape"),
        ({"origin": s.origin[:3]}, "origin has 3 sequences for 2 images"),
        ({"columns": 0}, "columns = 0"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            accept_window(**good | change)
