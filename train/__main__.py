"""``torchrun … -m echogen.train {pmtp,djo,cycle-rl} …``, with the arguments of ``echogen train``.

torchrun starts a module, and the command line is one. This folder may not import it (imports point
one way), so it is run as the program that it is. Only the first process reports.
"""

from __future__ import annotations

import os
import runpy
import sys

import torch.distributed as dist


def main() -> None:
    """Run `echogen train`; leave with its exit code."""
    sys.argv = ["echogen", "train", *sys.argv[1:]]
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    try:
        runpy.run_module("echogen", run_name="__main__", alter_sys=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
