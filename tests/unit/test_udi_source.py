"""The machine's package sources as sources of source packages (tools/udi_source.py): both forms that apt knows."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("udi_source", Path(__file__).parents[2] / "tools/udi_source.py")
assert SPEC and SPEC.loader
udi_source = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(udi_source)

SUITES = {"bookworm", "bookworm-security", "stable"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "deb http://mirror.example.org/debian bookworm main contrib # ours",
            ["http://mirror.example.org/debian bookworm"],
        ),
        ("deb-src https://mirror.example.org/debian stable main", ["https://mirror.example.org/debian stable"]),
        (
            "deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] http://mirror.example.org bookworm-security main",
            ["[signed-by=/usr/share/keyrings/a.gpg] http://mirror.example.org bookworm-security"],
        ),
        (
            "deb [arch=amd64] http://mirror.example.org/debian bookworm main",
            ["http://mirror.example.org/debian bookworm"],
        ),
        ("# deb http://mirror.example.org/debian bookworm main", []),
        ("deb http://mirror.example.org/debian bookworm-backports main", []),
        ("deb http://mirror.example.org/debian bookworm contrib", []),
        ("deb http://mirror.example.org/flat ./", []),
    ],
)
def test_lines(line: str, expected: list[str]) -> None:
    assert list(udi_source.source_lines(f"\n{line}\n", SUITES)) == [f"deb-src {entry} main\n" for entry in expected]


def test_stanzas() -> None:
    """Comments, fields over several lines (keys in the file), switched off, of another suite or component."""
    text = """\
# of the site
Types: deb
# a snapshot
URIs: http://mirror.example.org/debian
Suites: bookworm bookworm-backports
Components: main contrib
Architectures: amd64
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEZ

Types: deb
URIs: http://mirror.example.org/security
Suites: bookworm-security
Components: main
Enabled: no

Types: deb
URIs: http://mirror.example.org/other
Suites: nodistro
Components: main

Types: deb deb-src
URIs: http://mirror.example.org/tools
Suites: bookworm
Components: tools
"""
    (stanza,) = udi_source.source_stanzas(text, SUITES)
    lines = stanza.splitlines()
    assert "types: deb-src" in lines and "suites: bookworm" in lines and "components: main" in lines
    assert "uris: http://mirror.example.org/debian" in lines and "architectures" not in stanza
    assert stanza.endswith("signed-by:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEZ\n")
