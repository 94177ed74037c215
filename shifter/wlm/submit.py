"""At submission, as the user: the options of sbatch, salloc and srun are checked, and the tag becomes an identifier.

The SPANK plugin (slurm/shifter_slurm.c) runs it and exports what it prints: NUL-terminated NAME=VALUE, or one ``error=``.
It is a service to the user and no check that anything relies on: whatever reaches a prolog is checked there again.
Few imports, since each submission waits for them.
"""

import os
import sys

from shifter import _build, config
from shifter.errors import AccessError, ShifterError, UsageError
from shifter.images import reference, store
from shifter.volumes import parse_user

SSHD = ("yes", "no", "auto")
MAX_WISH = 8192
"""Characters of a variable; Slurm keeps it with the job, and every node of the job gets it."""


def check(options: dict[str, str], step: bool) -> list[tuple[str, str]]:
    """Return what is exported for these options. *step*: an srun in a job, whose image was chosen before. Raises ShifterError."""
    fields: list[tuple[str, str]] = []
    if "ccm" in options:
        fields += ccm(options.get("image", ""), step)
    elif "image" in options:
        fields += image(options["image"])
    elif not step:
        raise UsageError(f"--{next(iter(options))} is of no use without --image")
    if "volume" in options:
        parse_user(options["volume"])
        fields.append(("SHIFTER_VOLUME", options["volume"]))
    modules = [name for name in options.get("module", "").split(",") if name]
    if any(not name.isprintable() for name in modules):
        raise UsageError(f"--module {options['module']!a}: control characters are not allowed")
    if modules and modules != ["none"]:
        fields.append(("SHIFTER_MODULE", ",".join(modules)))
    if "sshd" in options:
        if options["sshd"] not in SSHD:
            raise UsageError(f"--sshd={options['sshd'][:40]!a}: it must be one of {', '.join(SSHD)}")
        if step:
            raise UsageError("--sshd is for jobs: this one is running, with or without it")
        fields.append(("SHIFTER_SSHD", options["sshd"]))
    for name, value in fields:
        if len(value) > MAX_WISH:
            raise UsageError(
                f"--{name.removeprefix('SHIFTER_').lower()}: longer than {MAX_WISH} characters, all of them together"
            )
    return fields


def ccm(text: str, step: bool) -> list[tuple[str, str]]:
    """Return the image of --ccm, which is the node's own root, and SHIFTER_CCM. Raises ShifterError."""
    if step:
        raise UsageError("--ccm is for jobs: this one is running, with or without it")
    if text and text != "local:/":
        raise UsageError(f"--ccm: its image is local:/, not {text!a}")
    if not config.load(_build.CONF).allowLocalChroot:
        raise AccessError(
            "--ccm: this site does not allow directories as images (allowLocalChroot in udiRoot.conf is 0)"
        )
    return [("SHIFTER_IMAGE", "/"), ("SHIFTER_IMAGETYPE", "local"), ("SHIFTER_CCM", "1")]


def image(text: str) -> list[tuple[str, str]]:
    """Return SHIFTER_IMAGE, SHIFTER_IMAGETYPE and SHIFTER_IMAGEREQUEST of what the user named. Raises ShifterError.

    Where this machine has no image store (a login node may not), the tag is looked up by each node of the job.
    """
    settings = config.load(_build.CONF)
    ref = reference.parse(text, settings.defaultImageType)
    if ref.kind in ("local", "id"):
        return [("SHIFTER_IMAGE", ref.name), ("SHIFTER_IMAGETYPE", ref.kind)]
    if not os.access(f"{settings.imagePath}/{store.TAGS}", os.R_OK | os.X_OK):
        note = f"{settings.imagePath} can't be read here: {ref} is looked up when the job starts"
        return [("note", note), ("SHIFTER_IMAGE", ref.name), ("SHIFTER_IMAGETYPE", ref.kind)]
    images = store.Store.open(settings.imagePath)
    try:
        caller = (os.getuid(), os.getgid(), os.getgroups())
        identifier = images.resolve(ref, caller)
        if not images.read_meta(identifier)[0].allows(*caller):
            raise AccessError(f"image {ref}: its access list names neither you nor one of your groups")
    finally:
        images.close()
    return [("SHIFTER_IMAGE", identifier), ("SHIFTER_IMAGETYPE", "id"), ("SHIFTER_IMAGEREQUEST", text)]


def main() -> int:
    """Print the fields for the options in the arguments: ``job`` or ``step``, then NAME=VALUE."""
    kind, *words = sys.argv[1:]
    try:
        fields = check(dict(word.split("=", 1) for word in words), kind == "step")
    except ShifterError as error:
        fields = [("error", error.chain())]
    os.write(1, b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in fields))
    return 0
