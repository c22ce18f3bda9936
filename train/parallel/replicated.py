"""Replicated data parallelism: every process has all the weights, and gradients are summed.

`DistributedDataParallel` is not used, for two reasons. It averages, but here the parts of a batch
add up (`shares`): each has already divided by the whole batch's count. And it has to be called in
place of the module, but a loss calls the module's pieces (embeddings, blocks, heads) as it needs
them, twice in a stage whose second pass reads what the first has drawn. What remains is small:
buckets of gradients, each sent as soon as backward has filled it, while backward continues.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from echogen.train.config import LoopConfig
from echogen.train.parallel.distributed import Several
from echogen.train.stages.stage import Stage

BUCKET_BYTES = 32 << 20
"""Bytes of gradients sent at once: enough to be worth a message, few enough that most are sent
while backward still runs (torch's own buckets hold 25 MiB)."""


SMALL_BYTES = 1 << 20
"""Gradients up to this size join a bucket that others fill, or each norm would be a message."""


class Bucket:
    """Parameters whose gradients travel together, and how many of them are still to come."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = 0
        self.sent: tuple[Tensor, dist.Work] | None = None

    def send(self) -> None:
        """Start summing the gradients. A missing gradient counts as zero; a flag for each parameter
        distinguishes the two. A parameter for which no process has a gradient gets none, or the
        optimizer would decay it."""
        first = self.parameters[0]
        # Made on the gradients' device: a copy from the host would wait for all of backward so far.
        there = first.new_ones(len(self.parameters), requires_grad=False)
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                there[i].zero_()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        row = torch.cat([*(g.flatten() for g in parts), there])
        self.sent = row, dist.all_reduce(row, async_op=True)

    def receive(self) -> None:
        """Wait for the sums and make them the gradients."""
        assert self.sent is not None
        row, work = self.sent
        work.wait()
        *sums, there = row.split([*(p.numel() for p in self.parameters), len(self.parameters)])
        for i, (p, total) in enumerate(zip(self.parameters, sums, strict=True)):
            # The flag is read (on a device: waited for) only if this process has no gradient.
            if p.grad is not None or float(there[i]) > 0:
                p.grad = total.view(p.shape)
        self.sent = None


def sent_together(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters into buckets, in order. A bucket has one dtype; its large parameters have
    up to ``BUCKET_BYTES`` together (or it has a single larger one), and its small ones up to as
    much again."""
    buckets: list[list[nn.Parameter]] = []
    kind, held = None, {True: 0, False: 0}
    for p in parameters:
        size = p.numel() * p.element_size()
        small = size <= SMALL_BYTES
        if p.dtype != kind or (held[small] and held[small] + size > BUCKET_BYTES):
            buckets.append([])
            kind, held = p.dtype, {True: 0, False: 0}
        buckets[-1].append(p)
        held[small] += size
    return buckets


class GradientSum:
    """Sums gradients over the processes.

    Buckets are sent in a fixed order, the same in every process. One that is full before its turn
    waits; those that a part of a batch leaves unfilled wait until `finish`.

    Args:
        parameters: those that are trained, in the order of the forward pass.
        idle: those that may get no gradient, in the same order: their buckets are the last, so that
            no other waits for them.
    """

    def __init__(
        self, parameters: list[nn.Parameter], idle: list[nn.Parameter] | None = None
    ) -> None:
        self._buckets: list[Bucket] = []
        for part in (parameters, idle or []):
            # Reversed: about the order in which backward finishes them.
            for together in sent_together(part[::-1]):
                self._buckets.append(Bucket(together))
        self._next = 0
        for bucket in self._buckets:
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(partial(self._filled, bucket))
        self.expect(1)

    def expect(self, passes: int) -> None:
        """Begin a step in which backward runs ``passes`` times before the sums are due."""
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = passes * len(bucket.parameters)

    def _filled(self, bucket: Bucket, _: Tensor) -> None:
        bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing <= 0:
            self._buckets[self._next].send()
            self._next += 1

    def finish(self) -> None:
        """Make the gradients the sums over all processes."""
        for bucket in self._buckets[self._next :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.receive()


class Replicated(Several):
    """All weights in every process (``parallel = "ddp"``)."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__(config)
        self._sum = GradientSum([])

    def prepare(self, stage: Stage) -> None:
        """See `Processes`."""
        super().prepare(stage)
        named = [(n, p) for n, p in stage.module.named_parameters() if p.requires_grad]
        idle: tuple[str, ...] = getattr(stage, "idle", ())
        self._sum = GradientSum(
            [p for n, p in named if not n.startswith(idle)],
            [p for n, p in named if n.startswith(idle)],
        )

    def shares(self, accumulate: int) -> list[tuple[int, int]]:
        """See `Processes`."""
        self._sum.expect(accumulate)
        return super().shares(accumulate)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """See `Processes`."""
        self._sum.finish()
        return super().clip(parameters, limit)
