"""What resets, or environments that come and go, leave behind in a process of their own: one line of JSON per reading.

    python leftovers.py resets NAME 200     memory in use (bytes), threads and open files after every tenth of them

The tests run it, as the memory of a process in which other tests have run goes up and down by more than what is sought.
"""

import gc
import json
import os
import sys
import threading

import numpy as np

from scd_robot.sim_eval import make_environment


def main(kind, name, times):
    environment = make_environment(name) if kind == "resets" else None
    for number in range(times):
        if kind == "resets":
            environment.reset(number)
            environment.step(np.zeros(environment.spec.action_dim, np.float32))
        else:
            other = make_environment(name)
            other.reset(number)
            other.render(64, 64)
            other.close()
            del other
        if (number + 1) % max(times // 20, 1) == 0:
            gc.collect()
            print(
                json.dumps([resident_bytes(), threading.active_count(), len(os.listdir("/proc/self/fd"))]), flush=True
            )


def resident_bytes():
    """Memory of this process that is in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
