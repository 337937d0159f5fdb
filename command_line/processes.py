"""torchrun, ending in few words: what finetune.sh starts several processes with.

Where a process has said in one line why it ends (``utils.say_last``), torchrun would add a block
for every process, and end with 1. This adds nothing, and ends with the processes' exit code.
"""

from __future__ import annotations

import gc
import logging
import os
import sys

if __name__ == "__main__":
    gc.disable()  # as run.py, while torch loads

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    # What it says about processes that end is in the exception, too.
    logging.disable(logging.ERROR)
    # What ends a run lets it save a checkpoint first: the processes get the signal, and the time.
    signals = "SIGINT,SIGTERM,SIGHUP,SIGUSR1,SIGUSR2"
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", signals)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if isinstance(failure.message, str):  # nobody has said anything
            raise
        # torchrun has stopped those that were slower to end.
        sys.exit(max(failure.exitcode for failure in error.failures.values()))
    except SignalException:
        sys.exit(130)
