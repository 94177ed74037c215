"""What a job's UDI with an sshd has more than others: our ssh where the image has its own, and login shells that find it.

Part of the build path.
"""

import posix

from shifter.errors import BuildError
from shifter.linux import paths, syscalls
from shifter.udi.assembly import ABSENT, Assembly, write_new
from shifter.udi.binds import ancestor_in
from shifter.udi.plan import Operation

UDI_IMAGE = "/opt/udiImage"
HOSTS_FILE = "/var/hostsfile"
LAUNCHERS = (
    "HYDRA_LAUNCHER=ssh",  # MPICH
    f"HYDRA_HOST_FILE={HOSTS_FILE}",
    "OMPI_MCA_plm=rsh",  # Open MPI
    f"OMPI_MCA_orte_default_hostfile={HOSTS_FILE}",
    "PMIX_MCA_gds=hash",  # and its tasks under srun: files in the directory of slurmd, which is not in the container
)
"""Environment in a job, unless user or image has it: mpiexec would go by the workload manager, whose programs images lack."""

NO_SHELL = f"{UDI_IMAGE}/libexec/shell"
"""The login shell in an image that has none: sshd lets nobody in whose shell is not there (udiImage/shell.c)."""

CLIENTS = ("ssh", "scp", "sftp")
_USUAL = ("/usr/local/bin", "/usr/bin", "/bin")
"""Where programs that name ssh by its path look for it, in the order of a usual PATH."""
_MAX_DIRECTORIES = 32

PROFILE_NAME = "00-shifter.sh"
"""After /etc/profile itself, before all that the image has in profile.d: that may add to PATH what it likes."""
PROFILE = b"""\
# Made by Shifter, for login shells: /etc/profile of many images sets PATH anew, and what the image and the site have put
# there is lost. A session of ssh gets it back; every other login shell at least finds the ssh between the job's nodes.
PATH=${SHIFTER_LOGIN_PATH:-${PATH-}}
unset SHIFTER_LOGIN_PATH
case ":$PATH:" in
    *:/opt/udiImage/bin:*) ;;
    *) PATH=${PATH:+$PATH:}/opt/udiImage/bin ;;
esac
export PATH
"""


def operations(env: "list[str]", taken: "set[str]") -> "list[Operation]":
    """Return the operations for an image with the environment *env*; *taken*: where something of the node is mounted."""
    named = [text.removeprefix("PATH=").split(":") for text in env if text.startswith("PATH=")]
    search = [directory for directories in named for directory in directories if directory.startswith("/")]
    directories = list(dict.fromkeys([*search[:_MAX_DIRECTORIES], *_USUAL]))
    return [Profile(), *(Cover(name, directories, taken | {UDI_IMAGE}) for name in CLIENTS)]


class Profile(Operation):
    """A file of ours above those that the image has in /etc/profile.d, whatever that is; read-only.

    A mount of its own: where /etc is not an overlay (Assembly.merge), ours would else hide the image's.
    """

    KIND = "profile"

    def __init__(self) -> None:
        super().__init__("/etc/profile.d", "login shells of ssh sessions keep PATH")

    def text(self) -> str:
        return f"{self.path} of the image below generated {PROFILE_NAME}"

    def details(self) -> "list[tuple[str, str]]":
        return [("generated", PROFILE_NAME)]

    def execute(self, assembly: Assembly) -> None:
        layer = assembly.new_layer([])
        write_new(assembly.generated, f"{layer}/{PROFILE_NAME}", PROFILE, 0o644)
        try:
            lower = assembly.open_image(self.path, posix.O_RDONLY | posix.O_DIRECTORY)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            assembly.attach_layer(layer, self.path)
        else:
            assembly.merge(layer, lower, self.path)
            posix.close(lower)


class Cover(Operation):
    """Our ssh, scp or sftp mounted on each one that the image has; its own stays to be had at /opt/udiImage/image.

    On the very entry of the directory, also where that is a symbolic link: what it leads to may be a program with many
    names, or nothing. Comes before siteFs and volumes, which may lie above it: they are wanted as they are.
    """

    KIND = "cover"

    def __init__(self, name: str, directories: "list[str]", taken: "set[str]") -> None:
        super().__init__(" ".join(f"{directory}/{name}" for directory in directories), "ssh between the job's nodes")
        self.name = name
        self.directories = directories
        self.taken = taken

    def text(self) -> str:
        return f"bind {UDI_IMAGE}/bin/{self.name} on {self.path}, where the image has it, and that on {self._place}"

    def details(self) -> "list[tuple[str, str]]":
        return [("source", f"{UDI_IMAGE}/bin/{self.name}"), ("original", self._place)]

    @property
    def _place(self) -> str:
        return f"{UDI_IMAGE}/image/{self.name}"

    def execute(self, assembly: Assembly) -> None:
        try:
            posix.close(assembly.open(self._place))
            ours = assembly.open(f"{UDI_IMAGE}/bin/{self.name}", syscalls.O_PATH | posix.O_NOFOLLOW)
        except FileNotFoundError:
            raise BuildError(
                f"the udiImage lacks bin/{self.name} or image/{self.name}: it is of an older Shifter; copy the new one there"
            ) from None
        original = -1
        for directory in self.directories:
            entry = self._entry(assembly, directory, posix.fstat(ours))
            if entry >= 0:
                mount = syscalls.open_tree(ours, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
                syscalls.move_mount(mount, entry, f"{directory}/{self.name}")
                posix.close(mount)
                posix.close(entry)
                # A program that came with a directory of its own (conda) may find its libraries only from there.
                if original < 0 and directory in _USUAL:
                    original = self._program(assembly, f"{directory}/{self.name}")
        posix.close(ours)
        if original >= 0:
            assembly.attach(assembly.clone_image(original), self._place)
            posix.close(original)

    def _entry(self, assembly: Assembly, directory: str, ours: "posix.stat_result") -> int:
        """Return a descriptor of the image's entry in *directory*, whatever it is but a directory; -1 for none."""
        parent = -1
        try:
            with assembly.reader:
                parent = assembly.open(directory, syscalls.O_PATH | posix.O_DIRECTORY)
                flags = syscalls.O_PATH | posix.O_NOFOLLOW
                entry = syscalls.openat2(parent, self.name, flags, syscalls.RESOLVE_BENEATH)
            status = posix.fstat(entry)
            ours_already = (status.st_dev, status.st_ino) == (ours.st_dev, ours.st_ino)  # /bin -> usr/bin
            if paths.is_directory(status.st_mode) or ours_already or ancestor_in(assembly.resolved(parent), self.taken):
                posix.close(entry)
                return -1
            return entry
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            return -1
        finally:
            if parent >= 0:
                posix.close(parent)

    def _program(self, assembly: Assembly, path: str) -> int:
        """Return a descriptor of the image's own program *path*, -1 if it is none."""
        try:
            program = assembly.open_image(path, syscalls.O_PATH)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            return -1
        if paths.is_program(posix.fstat(program).st_mode):
            return program
        posix.close(program)
        return -1
