"""Assemble everything Python as it will lie below LIBEXEC: the package, its dependencies, byte code, start-up files.

Byte code is never checked against its source at run time (unchecked hash): a stat less per module, and whatever the
clock or a restored backup did to the files, what was installed together runs together.
"""

import argparse
import compileall
import py_compile
import shutil
from pathlib import Path

from bundle import bundle

UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH

# -I: nothing of the caller's environment, directory or home is on the module search path. -S: nor is any other package of
# the machine, whose .pth files would be executed; and it saves 5 ms.
LAUNCHER = """\
#!{python} -IS
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, "{libexec}")
from {module} import main

sys.exit(main())
"""

# The interpreter's own end takes 4 ms; what these print is flushed where it is written.
QUICK_LAUNCHER = LAUNCHER.replace("import sys", "import os\nimport sys", 1).replace("sys.exit(", "os._exit(")

COMMANDS = {
    "shifterctl": "cli.shifterctl",
    "shifterimg": "cli.shifterimg",
    "setupRoot": "cli.setup_root",
    "unsetupRoot": "cli.unsetup_root",
    "shifter-slurm-prolog": "cli.slurm_prolog",
    "shifter-slurm-epilog": "cli.slurm_epilog",
}
"""The commands in Python, and the module that each is."""

QUICK = ("setupRoot", "unsetupRoot", "shifter-slurm-prolog", "shifter-slurm-epilog")
"""Those for which each job waits."""
BUNDLED = QUICK[:2]
"""Those of which all is needed, always."""

INTERNAL = {"shifter_cli.py": "cli.shifter", "slurm_submit.py": "wlm.submit"}
"""What the door runs for --help, --version and usage errors, and Slurm's plugin for options at submission."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--libexec", required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    out = args.out.with_name(args.out.name + ".new")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree("build/python-deps", out, ignore=shutil.ignore_patterns(".stamp", "__pycache__", "*.pyc"))
    shutil.copytree("shifter", out / "shifter", ignore=shutil.ignore_patterns("door", "__pycache__", "*.pyc"))
    shutil.copyfile("build/_build.py", out / "shifter" / "_build.py")
    launchers = args.out.with_name("launchers")
    launchers.mkdir(exist_ok=True)
    for name, module in COMMANDS.items():
        launcher, place = (
            QUICK_LAUNCHER if name in QUICK else LAUNCHER,
            name if name in BUNDLED else f"shifter.{module}",
        )
        (launchers / name).write_text(launcher.format(python=args.python, libexec=args.libexec, module=place))
    for name, module in INTERNAL.items():
        (out / name).write_text(LAUNCHER.format(python=args.python, libexec=args.libexec, module=f"shifter.{module}"))

    if not compileall.compile_dir(
        out, quiet=1, force=True, invalidation_mode=UNCHECKED, stripdir=str(out), prependdir=args.libexec
    ):
        raise SystemExit("byte-compiling failed")
    bundle(out, args.libexec, "builder", "shifter.udi.run", out / "shifter/builder.py")
    for name in BUNDLED:
        bundle(out, args.libexec, name, f"shifter.{COMMANDS[name]}")
    shutil.rmtree(args.out, ignore_errors=True)
    out.rename(args.out)


main()
