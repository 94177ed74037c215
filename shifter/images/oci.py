"""OCI images: made of any archive by skopeo, which checks all digests, and then read here: configuration and layers."""

import json
import os
import re
from typing import Any

from shifter.errors import ImageError
from shifter.images import helper
from shifter.images.meta import Meta

_MAX_JSON = 8 << 20
_DIGEST = re.compile(r"(sha256|sha512):[0-9a-f]{64,128}")
_LAYER_TYPE = re.compile(r"application/vnd\.(oci|docker)\.image\.(layer|rootfs)\..*tar.*")


def unpack_archive(kind: str, path: str, work: str) -> tuple[list[str], Meta]:
    """Return the paths of the layers, lowest first, and the configuration of the image in *path*.

    kind: skopeo's transport (oci, oci-archive, docker-archive); work: an empty private directory, for the layers.
    Raises ImageError.
    """
    link = os.path.join(work, "source")
    os.symlink(os.path.abspath(path), link)  # skopeo takes what follows a colon in a path for the name of an image
    layout = os.path.join(work, "oci")
    helper.run(
        ["skopeo", "--insecure-policy", "--tmpdir", work, "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"]
        + [f"{kind}:{link}", f"oci:{layout}:image"],
        f"{path} is no image that skopeo can read",
        environment={"HOME": work},
    )
    try:
        manifest = _json(layout, _only(_json_file(os.path.join(layout, "index.json")), "manifests"))
        config = _json(layout, manifest["config"])
        layers = [_blob(layout, layer) for layer in manifest["layers"] if _LAYER_TYPE.fullmatch(layer["mediaType"])]
        return layers, _meta(config.get("config") or {})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ImageError(f"{path}: malformed image manifest or configuration") from error


def _meta(config: dict[str, Any]) -> Meta:
    return Meta(
        env=[variable for variable in _strings(config.get("Env")) or [] if "=" in variable[1:]],
        entry=_strings(config.get("Entrypoint")) or None,
        cmd=_strings(config.get("Cmd")) or None,
        workdir=str(config.get("WorkingDir") or "") or None,
    )


def _strings(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("not a list of strings")
    return value


def _only(document: Any, key: str) -> Any:
    (item,) = document[key]
    return item


def _json(layout: str, descriptor: Any) -> Any:
    return _json_file(_blob(layout, descriptor))


def _json_file(path: str) -> Any:
    with open(path, "rb") as file:
        data = file.read(_MAX_JSON + 1)
    if len(data) > _MAX_JSON:
        raise ValueError("too large")
    return json.loads(data)


def _blob(layout: str, descriptor: Any) -> str:
    digest = descriptor["digest"]
    if not _DIGEST.fullmatch(digest):
        raise ValueError("bad digest")
    return os.path.join(layout, "blobs", *digest.split(":"))
