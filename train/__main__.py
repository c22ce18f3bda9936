"""``torchrun … -m echogen.train {pmtp,djo,cycle-rl} …``, with the arguments of ``echogen train``.

torchrun starts a module: this one, which runs the command line. The folder may not import the
command line (imports point one way), so it is run as a program. Only the first process reports.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist


@contextmanager
def leaving() -> Iterator[None]:
    """End this process after the block: together with the others if all went well, at once on an
    error.

    torchrun notices an error when a process exits with it. It then sends the others SIGTERM and, 30
    seconds later (its ``--shutdown-timeout``), SIGKILL, which also ends processes that wait in a
    collective, where no Python handler runs. So a process with an error waits for nobody: neither
    in `destroy_process_group`, which may wait for pending collectives, nor at interpreter exit,
    which joins the threads that write checkpoints.
    """
    code: object = 0
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        if isinstance(error, SystemExit):
            code = error.code
            if isinstance(code, str):  # the interpreter would print it
                print(code, file=sys.stderr)
        else:
            traceback.print_exc()
            code = 1
    if code:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Run `echogen train` and exit with its code."""
    sys.argv = ["echogen", "train", *sys.argv[1:]]
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    with leaving():
        runpy.run_module("echogen", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
