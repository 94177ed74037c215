"""Building a UDI: from a validated request to a pinned namespace and its record.

The order is fixed by what may see what. First everything of the caller's namespace is opened and cloned there (users'
paths with the users' rights), with no lock held that another user could wait for. Then the process goes home, and into a
private copy of the store namespace, where the UDI is put together from descriptors alone. It goes home again to pin the
result; the record appears last, by rename, when all that it promises is there. Part of the build path.
"""

import errno
import posix
import time

from shifter import fields, volumes
from shifter.config import Config
from shifter.errors import AccessError, BuildError, ImageError, ShifterError
from shifter.images import meta, reference, store
from shifter.linux import paths, syscalls
from shifter.linux.identity import Identity
from shifter.request import Request
from shifter.udi import etc, image_mounts, pins, plan, records
from shifter.udi.assembly import ROOT_ATTRIBUTES, Assembly
from shifter.udi.host import TTY_GID, Account, Host, Watch, open_procfs

MYPY = False
if MYPY:
    from collections.abc import Callable

_FORBIDDEN_SOURCES = (syscalls.PROC_SUPER_MAGIC, syscalls.NSFS_MAGIC)
"""File systems whose files mean something else for the builder than for the user (/proc/self), so never a source."""

MAX_VOLUMES = 128
"""Each is a copy of a whole mount tree: a thousand times "/" of a small node made 26,000 mounts, in one UDI."""

_OWN_TOP = ("proc", "sys", "dev", "tmp", "run", "etc", "var", "opt")
_OWN_VAR = ("run", "tmp", "spool", "empty", "shifterConfig.json")


class Builder:
    """One build. ``step`` is told what is being done, for ``-v`` and for the message when the builder dies."""

    def __init__(self, config: Config, request: Request, step: "Callable[[str], None]", prefix: str) -> None:
        self.config = config
        self.request = request
        self.step = step
        self.prefix = prefix
        self.user = Identity(request.uid, request.gid, request.groups)
        self.host = Host()
        for name in ("/etc/passwd", "/etc/group"):
            self.host.watch(name)  # before the first look at it: an edit in between must show
        self.account = Account(request.uid, request.gid)
        self.sources: list[tuple[int, int, str]] = []
        self.image: store.Image | None = None
        self.store: store.Store | None = None
        self.meta = meta.Meta()
        self.image_name = ""
        self.local = -1

    def resolve_image(self) -> None:
        """Find the image, check that this user may have it, and open it. Raises ImageError, AccessError, UsageError."""
        self.step("opening the image")
        ref = reference.parse(self.request.ref, self.config.defaultImageType)
        if ref.kind == "local":
            if not self.config.allowLocalChroot:
                raise AccessError(
                    f"{ref}: this site does not allow directories as images (allowLocalChroot in udiRoot.conf is 0)"
                )
            self.local = self._open_as_user(ref.name, "image", ImageError)
            self.image_name = str(ref)
            return
        self.store = store.Store.open(self.config.imagePath)
        identifier = self.store.resolve(ref, (self.request.uid, self.request.gid, self.request.groups))
        image = self.store.image(identifier)
        store.check_access(image, self.request.uid, self.request.gid, self.request.groups)
        self.image, self.meta, self.image_name = image, image.meta, identifier
        self.host.watches += image.watches

    def make(self, home: int) -> str:
        """Build the UDI, pin it, write its record, and return its key. *home*: the namespace in which pins live.

        Raises BuildError, AccessError, OSError. Whatever happens, no mount of a failed build survives this process.
        """
        if self.request.modules:
            raise BuildError(f"module {self.request.modules[0]!r}: this site has none configured")
        if sum(len(volumes.parse_user(text)) for text in self.request.volumes) > MAX_VOLUMES:
            raise BuildError(f"more than {MAX_VOLUMES} volumes")
        procfs = open_procfs()
        caller = pins.open_namespace("/proc/self/ns/mnt")
        self.step("cloning the node's directories")
        site = self._site_binds()
        users = self._user_binds()
        system = self._system_binds()
        devpts = self._devpts_mode()
        files = etc.EtcFiles(self.config, self.request, self.host, self.account)
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
        reader = self.user if self.local >= 0 else owner if image_tree >= 0 else Identity(0, 0)
        assembly = Assembly(procfs, image_root, reader, image_recursive=self.local >= 0)
        shell = self._shell(assembly)
        operations = self._plan(system, site, users, devpts, files.files(shell))
        plan.execute(operations, assembly)
        assembly.become_root()

        self.step("pinning the UDI")
        namespace = posix.open("self/ns/mnt", posix.O_RDONLY | posix.O_CLOEXEC, dir_fd=procfs)
        syscalls.setns(home)
        posix.close(caller)
        return self._publish(namespace, assembly.root_device, devpts, shell)

    def _open_as_user(self, path: str, what: str, kind: "type[ShifterError]" = BuildError) -> int:
        """Open the directory *path* of the caller's namespace with the user's rights, and remember what it was.

        Raises *kind*, or AccessError for what may never be mounted.
        """
        self.step(f"opening {what} {path} as the user")
        flags = syscalls.O_PATH | posix.O_DIRECTORY
        try:
            with self.user:
                fd = syscalls.openat2(syscalls.AT_FDCWD, path, flags, syscalls.RESOLVE_NO_MAGICLINKS)
        except OSError as error:
            raise kind(f"{what} {path}: {source_fault(error)}") from None
        try:
            forbidden = syscalls.filesystem_magic(fd) in _FORBIDDEN_SOURCES
            status = posix.fstat(fd)
        except OSError as error:  # FUSE without allow_other shows nothing to anybody but its owner
            hint = (
                "its file system refuses root ({}); mount it with allow_other" if error.errno == errno.EACCES else "{}"
            )
            raise kind(f"{what} {path}: {hint.format(error.strerror)}") from None
        if forbidden:
            raise AccessError(f"{what} {path} is on a proc file system, which can't be mounted into a container")
        self.sources.append((status.st_dev, status.st_ino, path))
        return fd

    def _slave(self, flags: "tuple[str, ...]" = ()) -> bool:
        if "private" in flags:
            return False
        return "slave" in flags or self.config.mountPropagationStyle == "slave"

    def _site_binds(self) -> "list[plan.Bind]":
        """Clone the sources of siteFs, as root: they are the site's."""
        binds: list[plan.Bind] = []
        for mount in self.config.siteFs:
            try:
                source = posix.open(mount.source, syscalls.O_PATH | posix.O_CLOEXEC)
                directory = paths.is_directory(posix.fstat(source).st_mode)
                attributes = ROOT_ATTRIBUTES | (syscalls.MOUNT_ATTR_RDONLY if "ro" in mount.flags else 0)
                clone = plan.clone_for_udi(source, "rec" in mount.flags, self._slave(mount.flags), attributes)
                posix.close(source)
            except OSError as error:
                raise BuildError(f"siteFs source {mount.source}: {source_fault(error)} ({mount.where})") from None
            binds.append(
                plan.Bind(
                    mount.target, mount.source, clone, " ".join(mount.flags), f"siteFs at {mount.where}", directory
                )
            )
        return parents_first(binds)

    def _user_binds(self) -> "list[plan.Bind]":
        """Open and clone the user's volumes: recursively, so that nothing which a mount hides is uncovered."""
        binds: list[plan.Bind] = []
        for text in self.request.volumes:
            for volume in volumes.parse_user(text):
                source = self._open_as_user(volume.source, "volume")
                attributes = ROOT_ATTRIBUTES | (syscalls.MOUNT_ATTR_RDONLY if "ro" in volume.flags else 0)
                try:
                    clone = plan.clone_for_udi(source, True, self._slave(), attributes)
                except OSError as error:
                    raise BuildError(f"volume {volume.source}: {source_fault(error)}") from None
                posix.close(source)
                flags = " ".join(("rec", *volume.flags))
                reason = f"--volume={volume}"
                binds.append(plan.Bind(volume.target, volume.source, clone, flags, reason, identity=self.user))
        return parents_first(binds)

    def _system_binds(self) -> "list[plan.Bind]":
        """Clone what every UDI has of the node: /dev, /sys, /tmp and /var/tmp, and Shifter itself, if it is in /opt."""
        locked = ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOEXEC
        slave = self._slave()
        wanted = [("/dev", True, syscalls.MOUNT_ATTR_NOSUID, slave), ("/sys", False, locked, False)]
        if self.host.is_mounted("/sys/fs/cgroup"):
            wanted.append(("/sys/fs/cgroup", True, locked, False))
        wanted += [("/tmp", True, ROOT_ATTRIBUTES, slave), ("/var/tmp", True, ROOT_ATTRIBUTES, slave)]
        if self._own_opt():
            wanted.append((self.prefix, False, ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY, False))
        binds: list[plan.Bind] = []
        for path, recursive, attributes, propagates in wanted:
            try:
                source = posix.open(path, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
            except FileNotFoundError:
                if path == "/var/tmp":
                    continue
                raise
            clone = plan.clone_for_udi(source, recursive, propagates, attributes)
            posix.close(source)
            binds.append(plan.Bind(path, path, clone, "rec" if recursive else "", "every UDI has it"))
        return binds

    def _own_opt(self) -> str:
        """Return NAME if Shifter is installed in /opt/NAME, else ""; the image's own /opt/NAME is then not shown."""
        parts = volumes.components(self.prefix)
        return parts[1] if len(parts) == 2 and parts[0] == "opt" else ""

    def _devpts_mode(self) -> str:
        """Return ``host`` when ptys of the node's /dev/pts get the container's tty group, else ``private``.

        An unprivileged sshd or screen can't change a pty's group, so it must be right from the start (DESIGN 3.4).
        """
        if self.config.devpts != "auto":
            return self.config.devpts
        options = self.host.mount_options("/dev/pts")
        return "host" if options.get("gid") == str(TTY_GID) and options.get("mode") == "620" else "private"

    def _directory_image(self) -> int:
        """Return a detached, read-only mount of an image that is a directory, -1 for an image file."""
        if self.local < 0 and self.meta.format != "VFS":
            return -1
        source = self.local if self.image is None else self.image.fd
        attributes = ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY
        return plan.clone_for_udi(source, self.local >= 0, False, attributes)

    def _image_root(self, where: str, tree: int) -> int:
        """Return a descriptor of the image's root directory in the copy of the store namespace."""
        if tree < 0:
            return posix.open(where, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        directory = posix.open("/directory", syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        syscalls.move_mount(tree, directory, self.image_name)
        posix.close(directory)
        return tree

    def _shell(self, assembly: Assembly) -> str:
        """Return the user's login shell if the image has it, else /bin/sh."""
        if self.account.shell.startswith("/"):
            try:
                fd = assembly.open_image(self.account.shell, syscalls.O_PATH)
            except OSError:
                return "/bin/sh"
            mode = posix.fstat(fd).st_mode
            posix.close(fd)
            if mode & 0o111 and mode & paths.S_IFMT == paths.S_IFREG:
                return self.account.shell
        return "/bin/sh"

    def _plan(
        self,
        system: "list[plan.Bind]",
        site: "list[plan.Bind]",
        users: "list[plan.Bind]",
        devpts: str,
        files: "list[tuple[str, bytes, int]]",
    ) -> "list[plan.Operation]":
        """Return the operations of this UDI in their order."""
        image, ours = f"image {self.image_name}", "every UDI has it"
        own = [plan.Directory("/" + name, ours) for name in ("dev", "proc", "run", "sys")]
        own += [plan.Directory("/var/spool", ours), plan.Directory("/var/empty", ours, 0o700)]
        own += [plan.Directory("/tmp", ours), plan.Directory("/var/tmp", ours)]
        shifter = self._own_opt()
        operations: list[plan.Operation] = [
            *own,
            plan.Symlink("/var/run", "/run", ours),
            plan.File("/var/shifterConfig.json", self._marker(), ours),
            plan.ImageDirectory("/", _OWN_TOP, image),
            plan.ImageDirectory("/var", _OWN_VAR, image),
            plan.Directory("/opt", ours),
            *([plan.Directory("/opt/" + shifter, ours)] if shifter else []),
            plan.ImageDirectory("/opt", ("udiImage", shifter), image),
            plan.Etc(files, [("mtab", "/proc/mounts")], ours),
            *system,
            plan.NewMount("/proc", "proc", self._proc_options(), ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_NOEXEC, ours),
        ]
        if devpts == "private":
            reason = f"devpts={self.config.devpts} ({self.config.where('devpts')})"
            options: dict[str, str | None] = {"gid": str(TTY_GID), "mode": "620", "ptmxmode": "666"}
            operations.append(
                plan.NewMount(
                    "/dev/pts", "devpts", options, syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NOEXEC, reason
                )
            )
            operations.append(plan.BindInside("/dev/ptmx", "/dev/pts/ptmx", reason))
        if site:
            operations.append(plan.MountPoints(site, [bind.path for bind in system] + ["/proc"]))
        return [*operations, *site, *users]

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
        )
        text = ",".join(f'"{key}":{json_string(value)}' for key, value in values)
        return ("{" + text + "}\n").encode("utf-8", "surrogateescape")

    def _publish(self, namespace: int, root_device: int, devpts: str, shell: str) -> str:
        """Pin *namespace* and write the record. Called at home, with the user's lock held."""
        content = self.request.canonical(self.image_name)
        watches: list[Watch] = [(0, path, status) for path, status in self.config.files] + self.host.watches
        content += [records.watch_field(watch) for watch in watches]
        content += [("source", f"{device}:{inode}:{path}") for device, inode, path in self.sources]
        content += [("env.image", text) for text in self.meta.env]
        for name, texts in (
            ("set", self.config.siteEnv),
            ("append", self.config.siteEnvAppend),
            ("prepend", self.config.siteEnvPrepend),
            ("unset", self.config.siteEnvUnset),
        ):
            content += [(f"env.{name}", text) for text in texts]
        content += [("entry", word) for word in self.meta.entry or ()]
        content += [("cmd", word) for word in self.meta.cmd or ()]
        if self.meta.workdir:
            content.append(("workdir", self.meta.workdir))
        content += [("shell", shell), ("devpts", devpts), ("root", str(root_device))]
        if self.image and self.meta.format != "VFS":
            content.append(("mounted", image_mounts.image_key(posix.fstat(self.image.fd))))
        content += [("ref", self.request.ref), ("built", str(int(time.time()))), ("end", "record")]
        record = fields.encode(content)
        key = self.request.key(self.image_name)
        directory = f"{pins.UDIS}/{self.request.uid}/{key}"
        pins.remove_udi(directory)
        posix.mkdir(directory, 0o700)
        try:
            pins.pin(namespace, f"{directory}/ns")
            pins.write_file(f"{directory}/record", record)
        except BaseException:
            pins.remove_udi(directory)
            raise
        return key


def source_fault(error: OSError) -> str:
    """Return why a path of the node can't be mounted; ELOOP is also what RESOLVE_NO_MAGICLINKS answers."""
    if error.errno == errno.ELOOP:
        return "too many symbolic links, or one of procfs (like /proc/self/fd/N), which would be the builder's"
    if error.errno == errno.ENOTDIR:
        return "is not a directory; only directories can be mounted"
    if error.errno == errno.EINVAL:
        return "this mount can't be shown elsewhere (it is unbindable)"
    return posix.strerror(error.errno or 0)


def parents_first(binds: "list[plan.Bind]") -> "list[plan.Bind]":
    """Return *binds* ordered by the depth of their targets, so that none hides one that was named before it."""
    return sorted(binds, key=lambda bind: len(volumes.components(bind.path)))


def json_string(text: str) -> str:
    """Return *text* as a JSON string (RFC 8259): quote, backslash and control characters escaped."""
    out = []
    for char in text:
        if char in '"\\':
            out.append("\\" + char)
        elif char < " ":
            out.append(f"\\u{ord(char):04x}")
        else:
            out.append(char)
    return '"' + "".join(out) + '"'
