"""Runs the prompts of a scheduler's requests: several in one forward, and those that recur once.

A forward of several prompts reads the weights once and launches each layer once, which on a GPU is
most of what one prompt costs (by arithmetic; not timed yet). On packed weights a prompt fills the
products by itself, and runs alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from echogen.engine.cache import Prefix, PrefixCache
from echogen.engine.serving.rows import Runner

PROMPTS = 256
"""Prompt tokens to run in one step; the prompts left then wait for the next step, since all images
being drawn wait while prompts run. That is several prompts of layouts with a few objects, or one of
a thousand tokens."""
FORWARD = 2 * PROMPTS
"""Most tokens of a forward of several prompts, pads included: enough for those of a step, unless
some are very long."""

Prompt = tuple[int, ...]
log = logging.getLogger("echogen.serving")


def forwards(prompts: Iterable[Prompt], together: bool) -> Iterator[list[Prompt]]:
    """Divide prompts into those of one forward each: prompts of similar length, which together with
    their pads have at most ``FORWARD`` tokens, or one that is longer; if not ``together``, one."""
    part = list[Prompt]()
    for prompt in sorted(prompts, key=len):
        if part and not (together and (len(part) + 1) * len(prompt) <= FORWARD):
            yield part
            part = []
        part.append(prompt)
    if part:
        yield part


class Prefill:
    """Runs prompts, and keeps what those that recur leave.

    Args:
        runner: what runs them.
        prefix_bytes: memory for the prefixes of prompts that recur.
        together: run several in one forward. They then depend on each other by rounding.
    """

    def __init__(self, runner: Runner, prefix_bytes: int, together: bool) -> None:
        self._runner, self._together = runner, together
        # Unconditional prompts recur; see `PrefixCache`.
        self._prefixes = PrefixCache(prefix_bytes)

    def warm_up(self, prompt_tokens: int, token: int) -> None:
        """Run the most that the requests of a step may have: a full forward of several prompts and,
        while half of what it left is held, two of the longest."""
        longest, held = [token] * prompt_tokens, list[Prefix]()
        if not self._together:
            self._runner.run_prompts([longest])
            return
        length = 1 << (min(prompt_tokens, FORWARD // 2).bit_length() - 1)  # divides FORWARD
        several = [longest[:length]] * (FORWARD // length)
        held += self._runner.run_prompts(several)[: len(several) // 2]
        for _ in range(2):
            held += self._runner.run_prompts([longest])

    def keeps(self, prompt: Prompt) -> bool:
        """Whether a prompt's prefix is kept, so that it need not be run."""
        return self._prefixes.get(prompt) is not None

    def run(self, prompt: Sequence[int], keep: bool = False) -> Prefix:
        """Return the prefix that a prompt leaves; ``keep`` stores it for the next time."""
        found = self.run_all({tuple(prompt): keep})[tuple(prompt)]
        if isinstance(found, Exception):
            raise found
        return found

    def run_all(self, prompts: Mapping[Prompt, bool]) -> dict[Prompt, Prefix | Exception]:
        """Return what each prompt leaves, or the error in which it ends; the values of ``prompts``
        say which prefixes to keep."""
        found: dict[Prompt, Prefix | Exception] = {}
        for prompt in prompts:
            if (prefix := self._prefixes.get(prompt)) is not None:
                found[prompt] = prefix
        for part in forwards((p for p in prompts if p not in found), self._together):
            found |= self._attempted(part, prompts)
        return found

    def _attempted(
        self, part: list[Prompt], keep: Mapping[Prompt, bool]
    ) -> dict[Prompt, Prefix | Exception]:
        """Run prompts in one forward. If that fails they run one by one: most may be sound, and
        without the others fit in memory."""
        try:
            pairs = zip(part, self._runner.run_prompts(part), strict=True)
            return {p: self._kept(p, prefix) if keep[p] else prefix for p, prefix in pairs}
        except Exception as error:
            if len(part) == 1:
                return {part[0]: error}
            # As text: a record that is kept would keep the error, and that the activations.
            log.warning("%d prompts run one by one: %s", len(part), str(error))
        # Here, and not above, the failed forward's activations are gone.
        alone = [self._attempted([prompt], keep) for prompt in part]
        return {prompt: each for found in alone for prompt, each in found.items()}

    def _kept(self, prompt: Prompt, prefix: Prefix) -> Prefix:
        self._prefixes.put(prompt, prefix)
        return self._prefixes.get(prompt) or prefix  # rows share by object identity
