"""Writers that are killed: imported once, then forked, so that each costs milliseconds.

A line on stdin, `folder segments microseconds`, starts a writer and kills it after so long (0: lets it finish);
a line on stdout says `killed` or `finished`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from archives import write


def main() -> None:
    """Serve until stdin ends."""
    for line in sys.stdin:
        folder, segments, microseconds = line.rsplit(" ", 2)
        child = os.fork()
        if child == 0:
            write(Path(folder), int(segments))
            os._exit(0)
        if int(microseconds):
            time.sleep(int(microseconds) / 1e6)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "finished" if status == 0 else "failed", flush=True)


if __name__ == "__main__":
    main()
