"""The builder's entry: ``PYTHON -I -S -B LIBEXEC/builder.pyc LOCK``, started by the door as root when a UDI is missing.

Descriptors: 0 the request, 2 a pipe to the door for what was not foreseen, 3 the answer; LOCK is the user's lock, or ``-``
when there is no /run/shifter yet. The environment is empty; limits, signals, session and scheduling are those that the
door set. Run as a file, since ``-m`` or a zip would import five milliseconds of machinery.
"""

import _ctypes  # noqa: F401
import grp  # noqa: F401 - extension modules of some Pythons, found before the search path is cut down
import posix
import pwd  # noqa: F401
import select  # noqa: F401
import sys
import syslog  # noqa: F401

# From here on only what is installed beside this file can be imported.
sys.path[:] = [__file__.rpartition("/")[0]]

from shifter.udi import run  # noqa: E402

posix._exit(run.main(sys.argv[1]))
