"""Small images for tests: a root file system of one static busybox, as a directory, squashfs or EROFS."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

BUSYBOX = "/bin/busybox"

_DIRS = {
    "bin": 0o755, "sbin": 0o755, "usr/bin": 0o755, "usr/sbin": 0o755, "usr/lib": 0o755, "lib": 0o755, "etc": 0o755,
    "var/lib": 0o755, "var/tmp": 0o1777, "tmp": 0o1777, "home": 0o755, "root": 0o700, "opt": 0o755, "mnt": 0o755,
    "srv": 0o755, "dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755,
}  # fmt: skip

_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/os-release": 'ID=tiny\nNAME="Tiny test image"\nVERSION_ID=1\n',
    "etc/hostname": "image\n",
    "etc/issue": "Tiny\n",
    "usr/lib/hello.txt": "hello from the image\n",
    "srv/data/file": "data\n",
}


class Tree:
    """A root file system in directory *path*, and what can be made of it: packed once, when first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def tiny(cls, path: Path) -> "Tree":
        """Busybox with all its applets in /bin and /usr/bin, and few files in /etc (no hosts, no resolv.conf)."""
        path.mkdir(parents=True, mode=0o755)
        for name, mode in _DIRS.items():
            (path / name).mkdir(parents=True, exist_ok=True)
            (path / name).chmod(mode)
        shutil.copyfile(BUSYBOX, path / "bin/busybox")
        (path / "bin/busybox").chmod(0o755)
        for applet in _applets():
            for place in ("bin", "usr/bin"):  # wherever a test looks for it
                if not os.path.lexists(link := path / place / applet):
                    link.symlink_to("/bin/busybox")
        for name, text in _FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
            (path / name).chmod(0o644)
        return cls(path)

    def copy(self, to: Path) -> "Tree":
        """A copy to change: symlinks, modes and owners as they are."""
        subprocess.run(["cp", "-a", "--reflink=auto", "-T", str(self.path), str(to)], check=True)
        return Tree(to)

    def pack(self, fmt: str) -> Path:
        """The tree as an image file of format *fmt* (squashfs, erofs) beside the directory."""
        out = self.path.with_name(f"{self.path.name}.{fmt}")
        if not out.exists():
            new = out.with_name(out.name + ".new")
            new.unlink(missing_ok=True)
            if fmt == "squashfs":
                argv = ["mksquashfs", str(self.path), str(new), "-comp", "zstd", "-Xcompression-level", "1"]
                argv += ["-no-xattrs", "-no-progress", "-quiet"]
            elif fmt == "erofs":
                argv = ["mkfs.erofs", "-zlz4hc", "--quiet", str(new), str(self.path)]
            else:
                raise ValueError(fmt)
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            new.rename(out)
        return out


@functools.cache
def _applets() -> list[str]:
    """Names of busybox's applets."""
    return subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
