"""The door's parsing in C against its specification in Python, on generated input; C runs under ASan and UBSan.

`build/door-driver` (tests/door/driver.c) answers what fields.c and parse.c of shifter/door make of each case. Few examples in an
ordinary run, many with `make soak`.
"""

import os
import re
import struct
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shifter import fields, options
from shifter.errors import FormatError, UsageError
from shifter.images import reference
from shifter.request import Request
from shifter.request import decode as decode_request
from tests.node import BUILD

OUR_BUILD = re.findall(r'SHIFTER_BUILD "(.*)"', (BUILD / "config.h").read_text())[0]
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
EXAMPLES = 5000 if os.environ.get("SHIFTER_SOAK") == "1" else 150
BOUNDED = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=CHECKS)

pytestmark = pytest.mark.soak


class Driver:
    """The running driver."""

    def __init__(self) -> None:
        program = BUILD / "door-driver"
        assert program.exists(), "make build/door-driver"
        environment = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def ask(self, *words: bytes | str) -> bytes:
        """Return what the driver prints for a case; a crash or a sanitizer's report fails the test."""
        data = [word.encode("utf-8", "surrogateescape") if isinstance(word, str) else word for word in words]
        assert self.process.stdin and self.process.stdout
        packed = b"".join(struct.pack("=I", len(word)) + word for word in data)
        self.process.stdin.write(struct.pack("=I", len(data)) + packed)
        self.process.stdin.flush()
        status, size = struct.unpack("=II", self.process.stdout.read(8))
        answer = self.process.stdout.read(size)
        code = os.waitstatus_to_exitcode(status)
        assert code == 0 or (code == 125 and answer.startswith(b"shifter: ")), answer.decode(errors="replace")
        return answer

    def lines(self, *words: bytes | str) -> list[str]:
        return [line.decode("utf-8", "surrogateescape") for line in self.ask(*words).split(b"\0")[:-1]]


driver: Driver


@pytest.fixture(scope="module", autouse=True)
def _driver() -> Iterator[None]:
    global driver
    driver = Driver()
    yield
    driver.process.kill()
    driver.process.communicate()


# Any byte but NUL, as file names and arguments have them.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0") | st.characters(
    min_codepoint=0xDC80, max_codepoint=0xDCFF
)
TEXT = (
    st.text(CHARACTERS, max_size=12)
    .map(lambda text: text.encode("utf-8", "surrogateescape"))
    .map(lambda data: data.decode("utf-8", "surrogateescape"))
)  # what decoding makes of it, so that both sides see the same

# --- options and environment -----------------------------------------------------------------------------------------

NAMES = [name for option in options.OPTIONS for name in (option.name, *option.aliases)]
LETTERS = [option.short for option in options.OPTIONS if option.short]
WORD = st.one_of(
    st.sampled_from(["--", "-", "", "cmd", "=", "--=x", "---", "-=", "--image", "-i", "--imag", "-n", "x=y"]),
    st.sampled_from(NAMES).map(lambda name: f"--{name}"),
    st.builds(lambda name, value: f"--{name}={value}", st.sampled_from([n for n in NAMES if n != "help"]), TEXT),
    st.builds(
        lambda letters, tail: "-" + "".join(letters) + tail, st.lists(st.sampled_from(LETTERS), max_size=4), TEXT
    ),
    TEXT,
    st.sampled_from(["e", "v", "image", "x"]).map(lambda text: "--" + text * 300),
)
VARIABLES = [
    prefix + name
    for prefix in ("", "SLURM_SPANK_")
    for name in ("SHIFTER_IMAGETYPE", "SHIFTER_IMAGE", "SHIFTER_IMAGEREQUEST", "SHIFTER_VOLUME", "SHIFTER_MODULE")
]


def same_image(left: str | None, right: str | None) -> bool:
    """Whether both name the same image, whatever type a name without one has."""
    try:
        kinds = ("docker", "custom")
        return (
            left is not None
            and right is not None
            and (left == right or all(reference.parse(left, kind) == reference.parse(right, kind) for kind in kinds))
        )
    except UsageError:
        return False


def invocation(words: list[str], environment: dict[str, str]) -> list[str]:
    """What the driver should print: the last value of each option, all values of the repeatable ones."""
    try:
        found, rest = options.parse(words)
    except UsageError as error:
        text = str(error).encode("utf-8", "surrogateescape")[:511]  # the door's message has a bound
        return ["usage", text.decode("utf-8", "surrogateescape")]
    for name, _ in found:
        if name in ("help", "version"):
            return [name, ""]

    def variable(name: str) -> str | None:
        return environment.get(name) or environment.get(f"SLURM_SPANK_{name}") or None

    values = {name: [value for key, value in found if key == name] for name in NAMES}
    kind, image, asked = (variable(f"SHIFTER_{name}") for name in ("IMAGETYPE", "IMAGE", "IMAGEREQUEST"))
    pair = f"{kind}:{image}" if kind and image else None
    submitted, image = asked, pair or asked or image
    asked = asked or image
    if values["image"]:
        image = asked = values["image"][-1]
        if kind == "id" and pair and same_image(asked, submitted):
            image = pair
    out = [f"image={image}"] if image is not None else []
    out += [f"request={asked}"] if asked is not None else []
    out += [f"volume={text}" for text in values["volume"] or [variable("SHIFTER_VOLUME")] if text is not None]
    out += [f"module={text}" for text in values["module"][-1:] or [variable("SHIFTER_MODULE")] if text is not None]
    out += [f"env={text}" for text in values["env"]]
    out += [f"env-file={text}" for text in values["env-file"][-1:]]
    for name in ("entrypoint", "workdir"):
        out += [name if text is None else f"{name}={text}" for text in values[name][-1:]]
    out += [name for name in ("clearenv", "verbose") if values[name]]
    return out + [f"word={word}" for word in rest]


def _check_options(words: list[str], environment: dict[str, str]) -> None:
    variables = [f"{name}={value}" for name, value in environment.items()]
    assert driver.lines("options", str(len(variables)), *variables, *words) == invocation(words, environment)


WORDS = st.lists(WORD, max_size=8)
NO_VARIABLES: st.SearchStrategy[dict[str, str]] = st.just({})
ENVIRONMENT = st.dictionaries(st.sampled_from(VARIABLES), TEXT, max_size=6)
test_options = BOUNDED(given(WORDS, NO_VARIABLES)(_check_options))
test_variables = BOUNDED(given(st.lists(WORD, max_size=3), ENVIRONMENT)(_check_options))


def test_the_tag_that_a_job_was_submitted_with() -> None:
    """It is what it meant then, in any spelling; another one, or a type that is no identifier, is looked up."""
    job = {"SHIFTER_IMAGE": "0a1b", "SHIFTER_IMAGETYPE": "id", "SHIFTER_IMAGEREQUEST": "docker:debian"}
    for text, image in (
        ("docker:debian", "id:0a1b"),
        ("docker:debian:latest", "id:0a1b"),
        ("docker:debian:12", "docker:debian:12"),
        ("debian", "debian"),  # perhaps of another type
        ("", ""),
    ):
        assert (
            driver.lines("options", "3", *(f"{k}={v}" for k, v in job.items()), f"--image={text}")[0]
            == f"image={image}"
        )
        _check_options([f"--image={text}"], job)
        _check_options([f"--image={text}"], {f"SLURM_SPANK_{name}": value for name, value in job.items()})
        _check_options([f"--image={text}"], job | {"SHIFTER_IMAGETYPE": "docker"})


# --- image references ------------------------------------------------------------------------------------------------

KINDS = [*reference.KINDS, "", "Docker", "dockers", "oci"]
PIECE = st.sampled_from(
    ["a", "Z9", "_", ".", "..", "-", "/", "//", ":", "@", "%", "%2F", " ", "\n", "\x7f", "é", "\udcff"]
)
NAME = st.lists(PIECE, max_size=10).map("".join) | TEXT
LONG = st.builds(
    lambda piece, size, tail: (piece * size)[:size] + tail,
    st.sampled_from(["a", "ab/", "a/", "/", "/b", "a."]),
    st.sampled_from([*range(70, 90), *range(235, 262), *range(4080, 4120)]),
    NAME,
)
REFERENCE = st.one_of(
    NAME,
    LONG,
    st.builds(lambda kind, name: f"{kind}:{name}", st.sampled_from(KINDS), NAME | LONG),
    st.builds(lambda name: f"local:/{name}", NAME | LONG),
)


def _check_reference(text: str, default: str) -> None:
    try:
        ref = reference.parse(text, default)
    except UsageError:
        expected = ["other"]
    else:
        if ref.kind in ("docker", "custom"):
            expected = [f"tag={reference.encode_tag(ref)}"]
        else:
            expected = [f"resolved={ref.name if ref.kind == 'id' else ref}"]
    assert driver.lines("reference", text, default) == expected


test_reference = BOUNDED(given(REFERENCE, st.sampled_from(KINDS))(_check_reference))


# --- documents -------------------------------------------------------------------------------------------------------

FIELD = st.one_of(
    st.builds(
        lambda key, value: f"{key}={value}".encode("utf-8", "surrogateescape"),
        st.sampled_from(["uid", "env.set", "end", "watch", "source"]),
        TEXT,
    ),
    st.sampled_from([b"", b"=", b"uid", b"uid=", b"=x", b"end=record", b"end", b"shifter=x", b"\xff=\xff", b"UID=1"]),
    st.binary(max_size=8),
)
HEAD = st.sampled_from([f"shifter={OUR_BUILD}".encode(), f"shifter={OUR_BUILD}x".encode(), b"shifter=", b"uid=1", b""])
DOCUMENT = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda head, items, tail: b"\0".join([head, *items]) + tail,
        HEAD,
        st.lists(FIELD, max_size=6),
        st.sampled_from(
            [b"\0end=record\0", b"\0end=record", b"\0end=site\0", b"\0end=\0", b"\0", b"", b"\0end=record\0\0"]
        ),
    ),
    st.builds(
        lambda size: (f"shifter={OUR_BUILD}\0uid=".encode() + b"1" * 65536)[: size - 12] + b"\0end=record\0",
        st.integers(65530, 65536),
    ),
)


def _check_document(data: bytes) -> None:
    got = driver.lines("document", data, "record")
    try:
        items = fields.decode(data, "record")
    except FormatError:
        items = []
    ours = bool(items) and items[0] == ("shifter", OUR_BUILD)
    if ours:  # what Python accepts the door reads alike
        written = [f"{key}={value}" for key, value in [*items, ("end", "record")]]
        first = next((value for key, value in items if key == "uid"), "(none)")
        assert got == ["valid", *written, f"first={first}"]
    elif got[0] == "valid":  # the door does not look at how keys are spelt: an unknown one means nothing to it
        parts = data[:-1].split(b"\0")
        assert data.endswith(b"\0end=record\0") and all(b"=" in part for part in parts)
        assert parts[0] == f"shifter={OUR_BUILD}".encode()
    else:
        assert got == ["invalid"]


test_document = BOUNDED(given(DOCUMENT)(_check_document))


# --- requests --------------------------------------------------------------------------------------------------------

UID = st.integers(1, 0xFFFFFFFE) | st.sampled_from([1, 1000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE])
GROUPS = st.lists(UID, max_size=40, unique=True).map(sorted) | st.sampled_from([4000, 4096]).map(
    lambda count: list(range(4294000000, 4294000000 + count))
)
PATHS = st.lists(TEXT | st.sampled_from(["/a:/b", "/a:/b:ro", "x" * 4000, "", "\n"]), max_size=18)
MODULES = st.lists(st.sampled_from(["mpi", "a,b", "none", "NONE", ""]), max_size=2)
IMAGE = st.sampled_from(["0123abcd", "local:/x y", "docker:debian:12", "local:/\udcff"]) | TEXT


def _check_request(
    uid: int, gid: int, groups: list[int], ns: int, once: str, image: str, volumes: list[str], modules: list[str]
) -> None:
    request = Request(OUR_BUILD, uid, gid, tuple(group for group in groups if group != gid), ns, image)
    request.once, request.volumes = once, volumes
    request.modules = [module for module in modules if module.lower() != "none"]
    head = [str(uid), str(gid), str(ns), once]
    tail = [",".join(map(str, groups)), str(len(volumes)), *volumes, *modules]
    canonical = request.canonical(image)
    try:
        expected = fields.encode(canonical)
    except FormatError:
        expected = b"shifter: the request is too long: fewer volumes or groups, please\n"
    assert driver.ask("request", *head, "image", image, *tail) == expected

    sent = driver.ask("request", *head, "ref", image, *tail)
    if sent.startswith(b"shifter: "):
        assert len(expected) + len(b"end=request\0") > fields.MAX_BYTES - 2 or expected == sent
        return
    assert sent == fields.encode(
        [("ref" if key == "image" else key, value) for key, value in canonical] + [("end", "request")]
    )
    try:
        read = decode_request(sent)
    except FormatError:  # only what the builder refuses by its own rules
        texts = [image, *volumes, *request.modules]
        assert not (ns or once) or any(not text or any(ord(c) < 32 or ord(c) == 127 for c in text) for text in texts)
    else:
        assert read.canonical(image) == canonical


REQUEST = (
    UID,
    UID,
    GROUPS,
    st.integers(0, 2**64 - 1),
    st.sampled_from(["", "0123456789abcdef"]),
    IMAGE,
    PATHS,
    MODULES,
)
test_request = BOUNDED(given(*REQUEST)(_check_request))


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:x", ["number=0", "x"]),
        ("00:x", ["none", "00:x"]),
        ("01:x", ["none", "01:x"]),
        ("18446744073709551615:", ["number=18446744073709551615", ""]),
        ("18446744073709551616:", ["none", "18446744073709551616:"]),
        ("12", ["none", "12"]),
        ("-1:", ["none", "-1:"]),
        ("+1:", ["none", "+1:"]),
        (" 1:", ["none", " 1:"]),
        ("", ["none", ""]),
        (":", ["none", ":"]),
        ("1x:", ["none", "1x:"]),
    ],
)
def test_take_number(text: str, expected: list[str]) -> None:
    assert driver.lines("number", text) == expected
