"""Building a UDI: from a validated request to a pinned namespace and its record.

The order is fixed by what may see what. First everything of the caller's namespace is opened and cloned there (users'
paths with the users' rights), with no lock held that another user could wait for. Then the process goes home, and into a
private copy of the store namespace, where the UDI is put together from descriptors alone. It goes home again to pin the
result; the record appears last, by rename, when all that it promises is there. Part of the build path.
"""

import posix
import time

from shifter import fields
from shifter.config import KEYS, Config
from shifter.errors import AccessError, BuildError, ImageError
from shifter.images import meta, reference, store
from shifter.linux import paths, syscalls
from shifter.linux.identity import ROOT, Identity
from shifter.request import Request
from shifter.udi import binds, etc, image_mounts, pins, plan, records, session, targets
from shifter.udi.assembly import ROOT_ATTRIBUTES, Assembly
from shifter.udi.host import TTY_GID, Account, Host, Watch, open_procfs
from shifter.udi.sources import Sources

MYPY = False
if MYPY:
    from collections.abc import Callable

_OWN_TOP = ("proc", "sys", "dev", "tmp", "run", "etc", "var", "opt")
_OWN_VAR = ("run", "tmp", "spool", "empty", "shifterConfig.json", "hostsfile")

MAX_PTYS = 128
"""Terminals of a /dev/pts of our own. The kernel has 4,096 for all instances together, of which 1,024 are kept for those of
the node's first mount namespace (kernel.pty.max, kernel.pty.reserve): no user, with ``udiMaxPerUser`` UDIs, takes them all."""


class Builder:
    """One build. ``step`` is told what is being done, for ``-v`` and for the message when the builder dies."""

    def __init__(
        self,
        config: Config,
        request: Request,
        step: "Callable[[str], None]",
        prefix: str,
        given: "dict[str, tuple[bytes, int, int]]",
    ) -> None:
        self.given = given
        """Files that setupRoot made for the job: content, mode and owner by name."""
        self.config = config
        self.request = request
        self.step = step
        self.prefix = prefix
        self.user = Identity(request.uid, request.gid, request.groups)
        self.host = Host()
        for name in ("/etc/passwd", "/etc/group"):
            self.host.watch(name)  # before the first look at it: an edit in between must show
        self.account = Account(request.uid, request.gid)
        self.sources = Sources(config, self.user, request.volumes, prefix, step)
        self.image: store.Image | None = None
        self.store: store.Store | None = None
        self.meta = meta.Meta()
        self.image_name = ""
        self.local = -1
        self.devpts = ""
        self.tty_gid: int | None = None
        """The group that new terminals have, of which the container's /etc/group says that it is ``tty``."""
        self.settings: list[plan.Setting] = []
        self.udi_image = False

    def resolve_image(self) -> None:
        """Find the image, check that this user may have it, and open it. Raises ImageError, AccessError, UsageError."""
        self.step("opening the image")
        ref = reference.parse(self.request.ref, self.config.defaultImageType)
        if ref.kind == "local":
            if not self.config.allowLocalChroot:
                raise AccessError(
                    f"{ref}: this site does not allow directories as images (allowLocalChroot in udiRoot.conf is 0)"
                )
            self.local = self.sources.open_directory(ref.name, "image", ImageError)
            self.image_name = str(ref)
            return
        self.store = store.Store.open(self.config.imagePath)
        identifier = self.store.resolve(ref, (self.request.uid, self.request.gid, self.request.groups))
        image = self.store.image(identifier)
        store.check_access(image, self.request.uid, self.request.gid, self.request.groups)
        self.image, self.meta, self.image_name = image, image.meta, identifier
        self.host.watches += image.watches

    def prepare(self) -> "list[plan.Operation]":
        """Open and clone all that comes of the node, in the caller's namespace; return the plan. Nothing is mounted yet.

        Raises BuildError, AccessError, UsageError, OSError.
        """
        if self.request.modules:
            raise BuildError(f"module {self.request.modules[0]!r}: this site has none configured")
        self.step("cloning the node's directories")
        site = self.sources.site()
        users = self.sources.users()
        system = self.sources.system(self.host.is_mounted("/sys/fs/cgroup"))
        udi_image = self.sources.udi_image()
        self._choose_devpts()
        self.udi_image = udi_image is not None
        nodes = self.given["hosts"][0] if self.request.setup else b""
        files = etc.EtcFiles(self.config, self.request, self.host, self.account, self.tty_gid, nodes)
        self.settings = self._settings()
        return [self._image_operation(), *self._operations(system, udi_image, site, users, files), *self.settings]

    def make(self, operations: "list[plan.Operation]", home: int) -> str:
        """Build the UDI by its plan, pin it, write its record, and return its key. *home*: the namespace of the pins.

        Raises BuildError, AccessError, OSError. Whatever happens, no mount of a failed build survives this process.
        """
        procfs = open_procfs()
        caller = pins.open_namespace("/proc/self/ns/mnt")
        image_tree = self._directory_image()

        self.step("mounting the image")
        syscalls.setns(home)
        stored = pins.open_namespace(pins.STORE)
        image_file = self.image if image_tree < 0 else None
        owner = self.store.account if self.store else self.user
        where = image_mounts.enter_store_copy(image_file, owner, home, stored)
        pins.unshare_until_younger(home, procfs)
        # The store is private throughout; this says so once more, before anything of the caller's is attached.
        syscalls.mount_setattr(syscalls.AT_FDCWD, "/", propagation=syscalls.MS_PRIVATE, recursive=True)
        image_root = self._image_root(where, image_tree)

        self.step("putting the UDI together")
        reader = self.user if self.local >= 0 else owner if image_tree >= 0 else ROOT
        assembly = Assembly(procfs, image_root, reader, image_recursive=self.local >= 0)
        self.sources.refuse_absent(assembly)
        plan.execute(operations, assembly, self.step if self.request.show else None)
        shell = self._shell(assembly)
        assembly.become_root()

        self.step("pinning the UDI")
        namespace = posix.open("self/ns/mnt", posix.O_RDONLY | posix.O_CLOEXEC, dir_fd=procfs)
        if assembly.mount_points:
            syscalls.setns(caller)
            self.sources.take_mount_points(assembly.mount_points)
        syscalls.setns(home)
        posix.close(caller)
        return self._publish(namespace, assembly.root_device, shell)

    def _choose_devpts(self) -> None:
        """Choose between the node's /dev/pts and one of our own, and the group that the container calls ``tty``.

        An unprivileged sshd, screen or old libc can't change a terminal's group: it must be that of ``tty`` from the start
        or, where there is no such group, the user's own. So ``auto`` takes the node's only if its terminals are right, and
        users can open its multiplexer; with ``host`` the group follows what the node has.
        """
        options = self.host.mount_options("/dev/pts")
        gid = options.get("gid")
        self.devpts = self.config.devpts
        if self.devpts == "auto":
            right = gid == str(TTY_GID) and options.get("mode") == "620" and _is_open_to_all("/dev/ptmx")
            self.devpts = "host" if right else "private"
        self.tty_gid = TTY_GID if self.devpts == "private" else int(gid) if gid else None

    def _directory_image(self) -> int:
        """Return a detached, read-only mount of an image that is a directory, -1 for an image file."""
        if self.local < 0 and self.meta.format != "VFS":
            return -1
        source = self.local if self.image is None else self.image.fd
        attributes = ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY
        return binds.clone_for_udi(source, self.local >= 0, False, attributes)

    def _image_root(self, where: str, tree: int) -> int:
        """Return a descriptor of the image's root directory in the copy of the store namespace."""
        if tree < 0:
            return posix.open(where, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        directory = posix.open("/directory", syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        syscalls.move_mount(tree, directory, self.image_name)
        posix.close(directory)
        return tree

    def _shell(self, assembly: Assembly) -> str:
        """Return the user's login shell if the image has it, else /bin/sh, else what says that there is none."""
        for shell in (self.account.shell, "/bin/sh"):
            if shell.startswith("/"):
                try:
                    fd = assembly.open_image(shell, syscalls.O_PATH)
                except OSError:
                    continue
                found = paths.is_program(posix.fstat(fd).st_mode)
                posix.close(fd)
                if found:
                    return shell
        return session.NO_SHELL if self.udi_image else "/bin/sh"

    def _image_operation(self) -> plan.Image:
        """Return what says which image it is, and where it lies on the node."""
        source, form = self.image_name.removeprefix("local:"), "directory"
        if self.image is not None:
            source, form = self.image.path, "directory" if self.meta.format == "VFS" else self.meta.format
        return plan.Image(self.image_name, source, form, f"image {self.request.ref}")

    def _settings(self) -> "list[plan.Setting]":
        """Return what the door shall do for each command, in the order in which it does it."""
        image = f"image {self.request.ref}"
        found = [plan.Setting("env.image", text, image) for text in self.meta.env]
        if self.request.setup:
            found += [plan.Setting("env.default", text, "mpiexec in a job") for text in session.LAUNCHERS]
        for name, key in (
            ("set", "siteEnv"),
            ("append", "siteEnvAppend"),
            ("prepend", "siteEnvPrepend"),
            ("unset", "siteEnvUnset"),
        ):
            for setting in self.config.settings.get(key, ()):
                texts: list[str] = KEYS[key](setting.value, setting)  # type: ignore[assignment]
                found += [plan.Setting(f"env.{name}", text, f"{key} at {setting}") for text in texts]
        found += [plan.Setting("entry", word, image) for word in self.meta.entry or ()]
        found += [plan.Setting("cmd", word, image) for word in self.meta.cmd or ()]
        if self.udi_image:
            found.append(plan.Setting("env.append", "PATH=/opt/udiImage/bin", "every UDI has it"))
        if self.meta.workdir:
            found.append(plan.Setting("workdir", self.meta.workdir, image))
        return found

    def _operations(
        self,
        system: "list[binds.Bind]",
        udi_image: "binds.Bind | None",
        site: "list[binds.Bind]",
        users: "list[binds.Bind]",
        files: etc.EtcFiles,
    ) -> "list[plan.Operation]":
        """Return the operations that make the file system of this UDI, in their order."""
        image, ours = f"image {self.request.ref}", "every UDI has it"
        own = [plan.Directory("/" + name, ours) for name in ("dev", "proc", "sys")]
        own += [plan.Directory("/var/spool", ours), plan.Directory("/var/empty", ours, 0o700)]
        own += [plan.Directory("/tmp", ours), plan.Directory("/var/tmp", ours)]
        shifter = self.sources.own_opt()
        sshd = udi_image is not None and any(name.startswith("etc.") for name in self.given)
        operations: list[plan.Operation] = [
            *own,
            plan.Scratch("/run", ours),
            plan.Symlink("/var/run", "/run", ours),
            plan.File("/var/shifterConfig.json", self._marker(), ours),
            plan.ImageDirectory("/", _OWN_TOP, image),
            plan.ImageDirectory("/var", _OWN_VAR, image),
            plan.Directory("/opt", ours),
            *([plan.Directory("/opt/" + shifter, ours)] if shifter else []),
            plan.ImageDirectory("/opt", ("udiImage", shifter), image),
            plan.Etc(files, [("mtab", "/proc/mounts")], ["profile.d"] if sshd else [], self._shell, ours),
            *system,
            *self._udi_image(udi_image),
            plan.NewMount("/proc", "proc", self._proc_options(), ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_NOEXEC, ours),
        ]
        if self.devpts == "private":
            reason = f"devpts={self.config.devpts} ({self.config.where('devpts')})"
            options: dict[str, str | None] = {
                "gid": str(TTY_GID),
                "mode": "620",
                "ptmxmode": "666",
                "max": str(MAX_PTYS),
            }
            operations.append(
                plan.NewMount(
                    "/dev/pts", "devpts", options, syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NOEXEC, reason
                )
            )
            operations.append(plan.BindInside("/dev/ptmx", "/dev/pts/ptmx", reason))
        if self.request.setup:
            operations.insert(len(own), plan.File(session.HOSTS_FILE, self.given["hostsfile"][0], "setupRoot -N"))
        taken = {"/proc", *(bind.path for bind in system)}
        if site or users:
            operations.append(targets.MountPoints([*site, *users], taken))
        if sshd:
            operations += session.operations(self.meta.env, taken)
        opened = [targets.Targets(users, self.user)] if users else []
        return [*operations, *site, *opened, *users]

    def _udi_image(self, bind: "binds.Bind | None") -> "list[plan.Operation]":
        """Return the operations of /opt/udiImage: its programs, and in a job's UDI the keys and settings of this job."""
        if bind is None:
            return []
        operations: list[plan.Operation] = [plan.Directory(bind.path, bind.reason), bind]
        files = [(name.removeprefix("etc."), *file) for name, file in self.given.items() if name.startswith("etc.")]
        if files:
            operations.append(plan.Files("/opt/udiImage/etc", files, "setupRoot"))
        return operations

    def _proc_options(self) -> "dict[str, str | None]":
        """Return the options that keep the node's own hidepid, gid and subset in force in a new procfs."""
        options = self.host.mount_options("/proc")
        return {name: options[name] for name in ("hidepid", "gid", "subset") if name in options}

    def _marker(self) -> bytes:
        """Return /var/shifterConfig.json: how programs of C Shifter's time, and the door, see that they are inside."""
        values = (
            ("identifier", self.image_name),
            ("user", self.account.name),
            ("volMap", ";".join(self.request.volumes)),
            ("modules", ""),
            ("job", self.request.job),
        )
        return (plan.json_object(list(values)) + "\n").encode("utf-8", "surrogateescape")

    def renew_job_record(self) -> None:
        """Say in the record of the job's UDI that the image's metadata, as it is now, lets this user in (resolve_image).

        Called at home, with the user's lock held. Raises AccessError if the job has no UDI, or one of another image.
        """
        record = records.read(f"{pins.UDIS}/{self.request.uid}/{pins.JOB_UDI}{self.request.job}")
        if record is None or record.get("image") != self.image_name:
            raise AccessError(f"job {self.request.job} has no UDI of {self.image_name} here")
        content = [field for field in record.values if field[0] != "watch"]
        content += [records.watch_field(watch) for watch in self._access_watches()]
        renewed = f"{record.directory}/renewed"
        try:
            pins.write_file(renewed, fields.encode([*content, ("end", "record")]))
            # A rename would bring back what unsetupRoot took away.
            syscalls.exchange(renewed, f"{record.directory}/record")
            posix.unlink(renewed)
        except FileNotFoundError:
            self._refuse_ended_job()
            raise

    def _access_watches(self) -> "list[Watch]":
        """Return the files that say who may use the image."""
        return [watch for watch in self.host.watches if watch[1].endswith(".meta")]

    def _publish(self, namespace: int, root_device: int, shell: str) -> str:
        """Pin *namespace* and write the record. Called at home, with the user's lock held."""
        content = self.request.canonical(self.image_name)
        if self.request.setup:  # fixed for the life of the job: only the access list counts
            content += [("setup", "1")]
            content += [records.watch_field(watch) for watch in self._access_watches()]
        else:
            watches: list[Watch] = [(0, path, status) for path, status in self.config.files] + self.host.watches
            content += [records.watch_field(watch) for watch in watches + self.sources.watches]
            content += [("source", f"{device}:{inode}:{path}") for device, inode, path in self.sources.taken]
        content += [(setting.key, setting.value) for setting in self.settings]
        content += [("shell", shell), ("devpts", self.devpts), ("root", str(root_device))]
        if self.image and self.meta.format != "VFS":
            content.append(("mounted", image_mounts.image_key(posix.fstat(self.image.fd))))
        content += [("ref", self.request.ref), ("built", str(int(time.time()))), ("end", "record")]
        record = fields.encode(content)
        key = pins.JOB_UDI + self.request.job if self.request.setup else self.request.key(self.image_name)
        directory = f"{pins.UDIS}/{self.request.uid}/{key}"
        self._refuse_ended_job()
        pins.remove_udi(directory)
        posix.mkdir(directory, 0o700)
        try:
            pins.pin(namespace, f"{directory}/ns")
            pins.write_file(f"{directory}/record", record)
            # Whoever took the job down before the record was there could not see it; later, it is found by that.
            self._refuse_ended_job()
        except BaseException:
            pins.remove_udi(directory)
            self._refuse_ended_job()  # rather than say which file went missing under our hands
            raise
        return key

    def _refuse_ended_job(self) -> None:
        """Raise BuildError if somebody has begun to take the job of this UDI down (jobs/teardown.py: end)."""
        job = self.request.job
        if self.request.setup:
            goes_on = pins.exists(f"{pins.JOBS}/{job}/setup")
        else:
            goes_on = not job or pins.exists(f"{pins.UDIS}/{self.request.uid}/{pins.JOB_UDI}{job}/record")
        if not goes_on:
            raise BuildError(f"job {job} was taken down meanwhile (unsetupRoot)")


def _is_open_to_all(path: str) -> bool:
    """True if every user can read and write *path* of the node."""
    try:
        return posix.stat(path).st_mode & 0o006 == 0o006
    except OSError:
        return False
