"""Weights that are known by name, got by the downloaders of the libraries that publish them, into their caches.

| name | what it means |
|---|---|
| a path | that file, or the checkpoint in that folder |
| ``https://…`` | the file there, in the cache of `torch.hub` |
| ``DEFAULT``, ``IMAGENET1K_V1`` | torchvision's, of the variant that is asked for |
| ``torchvision:densenet121``, ``DenseNet121_Weights.IMAGENET1K_V1`` | torchvision's, of that network |
| ``timm:densenet121``, ``timm:densenet121.ra_in1k`` | timm's, in the cache of Hugging Face |
| ``hf:owner/name``, ``hf:owner/name:file`` | a model on Hugging Face |
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch

from efficient_densenet.errors import UserError, require
from efficient_densenet.weights.formats import shortened
from efficient_densenet.weights.shards import USUAL_FILES, is_index, read_index

_TORCHVISION = re.compile(
    r"(?:torchvision:(?P<any>\w+?)|(?P<variant>densenet\d+))(?:_weights)?(?:\.(?P<member>\w+))?", re.IGNORECASE
)
_MEMBER = re.compile(r"DEFAULT|IMAGENET1K_V\d+")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")


class Published(NamedTuple):
    """A file of weights, and what its publisher says of it.

    Attributes:
        path: of the file.
        class_names: in the order of the outputs; None: nothing is said.
        preprocessing: of images for evaluation, as ``size``, ``resize``, ``mean`` and ``std``; None likewise.
    """

    path: Path
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] | None = None


def get_published(name: str | os.PathLike[str], variant: str = "") -> Published:
    """The file that `name` means; it is downloaded if it is not in the publisher's cache.

    Args:
        name: one of the forms in the table above.
        variant: for names that do not say it, for example ``densenet121``.

    Raises:
        UserError: there is no such file or name, it cannot be downloaded, or its hash is wrong.
        MissingExtraError: the publisher's library is not installed.
    """
    text = str(name)
    if Path(text).exists():
        return Published(Path(text))
    if text.startswith(("https://", "http://")):
        return Published(_download(text))
    if text.startswith("timm:"):
        return _of_timm(text.removeprefix("timm:"))
    if text.startswith("hf:"):
        repository, _, file = text.removeprefix("hf:").partition(":")
        return Published(_download_from_hugging_face(repository, (file,) if file else USUAL_FILES))
    if _MEMBER.fullmatch(text) and variant:
        return _of_torchvision(variant, text)
    if match := _TORCHVISION.fullmatch(text):
        return _of_torchvision((match["any"] or match["variant"]).lower(), match["member"] or "DEFAULT")
    raise UserError(
        f"there is no file {shortened(text)}, and there are no weights of that name: give a file, a URL, "
        "torchvision:densenet121, timm:densenet121.ra_in1k or hf:owner/name"
    )


def _of_torchvision(variant: str, member: str) -> Published:
    models = require("torchvision.models", "weights")
    try:
        weights = getattr(models.get_model_weights(variant), member)
    except (ValueError, AttributeError) as error:
        raise UserError(f"torchvision publishes no weights {member} of {variant}") from error
    transform = weights.transforms()
    return Published(
        _download(weights.url),
        list(weights.meta["categories"]),
        {
            "size": transform.crop_size[0],
            "resize": transform.resize_size[0],
            "mean": tuple(transform.mean),
            "std": tuple(transform.std),
        },
    )


def _of_timm(name: str) -> Published:
    timm = require("timm", "weights")
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(
            f"timm publishes no weights {name!r}; timm.list_pretrained('*densenet*') lists those that it has"
        )
    if config.hf_hub_id:
        files = (config.hf_hub_filename,) if config.hf_hub_filename else USUAL_FILES
        path = _download_from_hugging_face(config.hf_hub_id, files)
    else:
        path = _download(config.url)
    names = timm.data.ImageNetInfo().label_descriptions(detailed=False) if config.num_classes == 1000 else None
    size = config.input_size[-1]
    resize = int(size / config.crop_pct)
    return Published(path, names, {"size": size, "resize": resize, "mean": config.mean, "std": config.std})


def _download(url: str) -> Path:
    """The file at `url` in the cache of `torch.hub`, where torchvision's weights are too."""
    file = os.path.basename(urlparse(url).path)
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    found = _HASH_IN_NAME.search(file)
    expected = found[1] if found else None
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=False)
        except (OSError, RuntimeError, ValueError) as error:  # no network, or another hash
            raise UserError(
                f"cannot download {url} ({shortened(str(error))}); get that file elsewhere and put it here: {path}"
            ) from error
    _check_hash(path, expected)
    return path


def _download_from_hugging_face(repository: str, files: tuple[str, ...]) -> Path:
    """The first of `files` that is there; where it is an index of shards, they lie beside it."""
    for file in files:
        path = _file_on_hugging_face(repository, file)
        if path is None:
            continue
        for shard in read_index(path) if is_index(path) else ():
            if _file_on_hugging_face(repository, str(PurePosixPath(file).parent / shard)) is None:
                raise UserError(f"{repository} on Hugging Face lacks the file {shard}, which its {file} names")
        return path
    raise UserError(f"{repository} on Hugging Face has no file {' or '.join(files)}; name one: hf:{repository}:FILE")


def _file_on_hugging_face(repository: str, file: str) -> Path | None:
    """None where the repository is there, and the file is not."""
    hub, errors = require("huggingface_hub", "weights"), require("huggingface_hub.errors", "weights")
    try:
        path = Path(hub.hf_hub_download(repository, file))
    except errors.EntryNotFoundError as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        raise _not_downloaded(repository, file, error) from error
    except (OSError, ValueError) as error:
        raise _not_downloaded(repository, file, error) from error
    # In that cache a large file has its hash for a name, and `path` is a link to it.
    stored = path.resolve().name
    _check_hash(path, stored if re.fullmatch("[0-9a-f]{64}", stored) else None)
    return path


def _not_downloaded(repository: str, file: str, error: Exception) -> UserError:
    return UserError(
        f"cannot download {file} of {repository} from Hugging Face ({shortened(str(error))}); get "
        f"https://huggingface.co/{repository}/resolve/main/{file} elsewhere, and give the path of that file instead"
    )


def _check_hash(path: Path, expected: str | None) -> None:
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise UserError(
            f"{path} is damaged (its SHA-256 is not {expected}…): delete it, so that it is downloaded again"
        )
