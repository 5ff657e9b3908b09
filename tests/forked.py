"""Ranks: forked from one process that has imported everything, or scripts that torchrun starts."""

import os
import sys
import traceback


def fork_ranks(run, size, *arguments):
    """Call ``run(rank, *arguments)`` in a child for each rank, and return the largest exit code: 1 where one raised."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                run(rank, *arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def run_as_rank(main):
    """``main(*arguments of the script)`` in a process of its own on one core."""
    import torch

    torch.set_num_threads(1)
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own way out
