"""Files of Hugging Face's hub, from its cache or through its own client."""

from __future__ import annotations

import re
from pathlib import Path

from vitfast.checkpoints.files import FOLDER_FILES, INDEX, shard_names

PREFIX = re.compile(r"hf[-_]hub:")
NAME = re.compile(r"hf[-_]hub:(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>\w[\w.-]*(/[\w-][\w.-]*)*))?", re.ASCII)
# in the order in which timm and transformers take them
FILES = (
    "model.safetensors", "model.safetensors" + INDEX, "open_clip_model.safetensors", "pytorch_model.bin",
    "pytorch_model.bin" + INDEX, "open_clip_pytorch_model.bin",
)  # fmt: skip
BESIDE = ("config.json", "preprocessor_config.json", "open_clip_config.json")


def is_hub_name(source: object) -> bool:
    return isinstance(source, str) and PREFIX.match(source) is not None


def hub_file(name: str) -> Path:
    """The file of weights of a repository, in the cache; its config files and shards are beside it.

    What is not in the cache is downloaded. HF_HUB_OFFLINE forbids that, HF_HOME and HF_HUB_CACHE say where the cache
    is; timm and transformers have the same one.

    Args:
        name: 'hf-hub:owner/name' or 'hf-hub:owner/name@revision', as timm writes it.

    Raises:
        ValueError: another name.
        FileNotFoundError: nothing of it is cached and the hub cannot be asked, or has no such weights.
        ImportError: huggingface_hub is not installed.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"name must be 'hf-hub:owner/name' or 'hf-hub:owner/name@revision', got {name!r}")
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{name!r} needs huggingface_hub: pip install huggingface_hub") from error

    def missing(why: str, cause: Exception | None = None) -> FileNotFoundError:
        error = FileNotFoundError(f"{name!r}: {why}")
        error.__cause__ = cause
        return error

    def fetched(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(match["repo"], file, revision=match["revision"]))
        except LocalEntryNotFoundError as error:
            if constants.HF_HUB_OFFLINE:
                return None
            why = f"not in the cache {constants.HF_HUB_CACHE!r}, and the hub cannot be reached"
            raise missing(why, error) from error
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise missing(f"the hub refuses it: {error}", error) from error

    path = next((path for file in FILES if (path := fetched(file)) is not None), None)
    if path is None and constants.HF_HUB_OFFLINE:
        raise missing(
            f"none of its weights ({', '.join(FOLDER_FILES)}) are in the cache {constants.HF_HUB_CACHE!r}, and "
            "HF_HUB_OFFLINE forbids a download: unset it, or set HF_HOME to the cache that has them"
        )
    if path is None:
        raise missing(f"the repository has none of {', '.join(FILES)}")
    shards = shard_names(path) if path.name.endswith(INDEX) else []
    lost = [shard for shard in shards if fetched(shard) is None]
    if lost:
        raise missing(
            f"{lost[0]}, which {path.name} names, is neither in the cache {constants.HF_HUB_CACHE!r} nor there"
        )
    for file in BESIDE:
        fetched(file)
    return path
