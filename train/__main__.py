"""``torchrun … -m echogen.train {pmtp,djo,cycle-rl} …``, with the arguments of ``echogen train``.

torchrun starts a module, and the command line is one. This folder may not import it (imports point
one way), so it is run as the program that it is. Only the first process reports.
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
    """Leave the other processes behind the block: with them where all went well, and with an error
    at once.

    torchrun notices an error by the process that ends of it. It then sends the others SIGTERM and
    30 seconds later (its ``--shutdown-timeout``) SIGKILL, which ends those too that wait within a
    collective, where no handler of Python's runs. So a process with an error waits for nobody: not
    in `destroy_process_group`, which may wait for collectives under way, and not at the end of the
    interpreter, which joins the threads that write checkpoints.
    """
    code: object = 0
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        if isinstance(error, SystemExit):
            code = error.code
            if isinstance(code, str):  # which the interpreter would say
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
    """Run `echogen train`; leave with its exit code."""
    sys.argv = ["echogen", "train", *sys.argv[1:]]
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    with leaving():
        runpy.run_module("echogen", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
