"""What the plan of a job's UDI says of the image's own ssh and of login shells; what is done: tests/cluster/test_session*.py."""

import json

from shifter.udi import session


def test_operations_say_what_they_do_and_why() -> None:
    image = ["A=1", "PATH=/opt/conda/bin:relative::/usr/bin", "PATH=/second"]
    profile, *covers = (json.loads(operation.serialise()) for operation in session.operations(image, {"/tmp"}))
    assert (profile["do"], profile["path"], profile["generated"]) == ("profile", "/etc/profile.d", "00-shifter.sh")
    for name, cover in zip(("ssh", "scp", "sftp"), covers, strict=True):
        assert cover["do"] == "cover" and cover["source"] == f"/opt/udiImage/bin/{name}"
        places = ("/opt/conda/bin", "/usr/bin", "/second", "/usr/local/bin", "/bin")
        assert cover["path"] == " ".join(f"{place}/{name}" for place in places)
        assert cover["original"] == f"/opt/udiImage/image/{name}" and cover["original"] in cover["text"]
        assert cover["reason"] == "ssh between the job's nodes"


def test_path_of_an_image_is_bounded() -> None:
    endless = "PATH=" + ":".join(f"/{number}" for number in range(10_000))
    cover = session.operations([endless], set())[1]
    assert len(cover.path.split()) == 35
