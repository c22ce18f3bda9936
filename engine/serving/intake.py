"""Turns an order into a request that can be drawn, or refuses it and says why."""

from __future__ import annotations

import torch

from echogen.engine.decoding.jacobi import foreseeable
from echogen.engine.decoding.sampler import Sampler, check_draws
from echogen.engine.engine import Engine
from echogen.engine.layout import LayoutError
from echogen.engine.serving.budget import Plan
from echogen.engine.serving.partial import Pictures
from echogen.engine.serving.request import Order, Request


class Intake:
    """Makes requests that fit the planned slots; may be called from any thread."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan, self._table = engine, plan, engine.code_table
        self._pictures = Pictures(engine)

    @property
    def outdated(self) -> bool:
        """Whether the engine's weights were refreshed since this was made."""
        return self._engine.code_table is not self._table

    def request(self, order: Order, now: float) -> Request:
        """The request for an order placed at time ``now``, with its prompts built.

        Raises:
            LayoutError: a prompt too long for the slots, or with reserved tokens.
            ValueError: more rows than there are slots, draws that are not one 32-bit word for each
                image, or guidance that does not fit the image.
        """
        for layout in (order.layout, order.negative):
            if layout is not None:  # by its characters first: 4 MiB take seconds to tokenise
                texts = (layout.caption, *(o.expr for o in layout.objects))
                self._check_length(self._engine.prompts.fewest(*texts), "at least ")
        prompts = self._engine.prompt_rows([order.layout], order.sampling, order.negative)
        self._check_length(max(map(len, prompts)))
        self._check_rows(len(prompts), order.samples)
        c, device = self._engine.transformer.config, self._table.device
        ids = torch.tensor(check_draws(order.draws, order.samples), device=device)
        sampler = Sampler(order.sampling, order.seed, ids, c.codebook_size, c.image_tokens)
        none = torch.empty(len(ids), 0, dtype=torch.int64, device=device)
        deadline = None if order.timeout is None else now + order.timeout
        return Request(
            order, prompts, sampler, none, c.image_tokens, self._pictures, deadline,
            foreseeable=foreseeable(order.layout, self._table.dtype),
        )  # fmt: skip

    def _check_length(self, tokens: int, least: str = "") -> None:
        most = self._plan.prompt_tokens
        if tokens > most:
            raise LayoutError(
                f"the layout takes {least}{tokens} tokens; the slots are made for prompts of "
                f"{most} (prompt_tokens), so shorten its texts or name fewer objects"
            )

    def _check_rows(self, prompts: int, samples: int) -> None:
        rows, slots = samples * prompts, self._plan.slots
        if rows > slots:
            most = slots // prompts
            raise ValueError(
                f"samples = {samples} take {rows} slots"
                f"{', two each with guidance' if prompts > 1 else ''}, and there are "
                f"{slots}; ask for "
                f"{f'{most} at most' if most else 'one without guidance (cfg = 1)'}"
            )
