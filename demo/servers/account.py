"""
Whom a server runs as.

Whoever is no root runs it as himself. Root does not: PostgreSQL refuses that, and a
server that is broken into shall reach nothing. On Linux it gets an account of its
own, a number that is nobody's, out of those that systemd gives out in the same way
(DynamicUser). So it shares its data, its memory and its environment with no other
program, as it would with all the others that run as ``nobody``. ``initdb`` asks for
the name of the account at hand, so the server sees, in a mount namespace, an
``/etc/passwd`` of root's with that name. Where that may not be (a container
without CAP_SYS_ADMIN), and elsewhere than on Linux, it runs as ``nobody``.
"""

import ctypes
import os
import pwd
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Account"]

LIBC = ctypes.CDLL(None, use_errno=True)
NUMBERS = range(61184, 65520)  # systemd.io/UIDS-GIDS: dynamic service users

# <linux/prctl.h>, <linux/sched.h>, <linux/mount.h>
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000


@dataclass(frozen=True)
class Account:
    """``user`` is None where nobody's rights are to be dropped."""

    user: int | None = None
    group: int | None = None
    passwd: Path | None = None  # what it is to see as /etc/passwd

    @classmethod
    def for_servers(cls, folder: Path) -> "Account":
        """That which a server in the folder is to run as. The folder is the caller's alone."""
        if os.geteuid() != 0:
            return cls()
        if sys.platform == "linux":
            number = _free_number()
            passwd = folder / "passwd"
            passwd.write_text(f"scoped:x:{number}:{number}::/nonexistent:/bin/false\n")
            passwd.chmod(0o644)
            account = cls(number, number, passwd)
            with suppress(subprocess.SubprocessError, OSError):
                subprocess.run(["/bin/true"], preexec_fn=account.enter, check=True)
                return account
        for name in ("nobody", "postgres"):
            with suppress(KeyError):
                found = pwd.getpwnam(name)
                return cls(found.pw_uid, found.pw_gid)
        raise RuntimeError("As root this needs a user `nobody` or `postgres` to run servers as.")

    def enter(self) -> None:
        """For ``preexec_fn``: become it, and on Linux end with the parent."""
        if self.passwd is not None:
            _call("unshare", CLONE_NEWNS)
            _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            _call("mount", os.fsencode(self.passwd), b"/etc/passwd", None, MS_BIND, None)
        if self.user is not None and self.group is not None:
            os.setgroups([])
            os.setgid(self.group)
            os.setuid(self.user)
        if sys.platform == "linux":
            # After the rights are dropped, which undoes it.
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGINT)
            _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    def give(self, thing: Path | int) -> None:
        """A thing that is new, in a folder in which nobody else can put anything in its place."""
        if self.user is not None and self.group is not None:
            os.chown(thing, self.user, self.group)


def _free_number() -> int:
    taken = {one.pw_uid for one in pwd.getpwall()}
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            taken.add(process.stat().st_uid)
    return secrets.choice([number for number in NUMBERS if number not in taken])


def _call(name: str, *arguments: object) -> None:
    if getattr(LIBC, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
