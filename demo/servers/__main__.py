"""The watcher of one server, as ``demo/servers/__init__.py`` starts it."""

import signal
import sys
from pathlib import Path

from demo.servers.kinds import KINDS


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        # The watcher ends when its user does. Not SIG_IGN, which the server would inherit.
        signal.signal(number, lambda *_: None)
    kind, package, *programs = sys.argv[1:]
    KINDS[kind]().watch(Path(package), [Path(program) for program in programs])


if __name__ == "__main__":
    main()
