"""Adapter folders on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from vision_remember.adapters.attachment import Attachment
from vision_remember.adapters.checkpoint import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, save_adapter
from vision_remember.adapters.repo_id import is_repo_id
from vision_remember.adapters.resolve import HostParts

# huggingface_hub is imported where it is used: slow to import, and seldom needed.

FILES = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
"""All that is ever sent or fetched: JSON, safetensors and the card. No code, no pickle."""


def push_adapter(
    attachment: Attachment,
    parts: HostParts,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
    token: str | None,
) -> str | None:
    """Uploads the adapter folder as one commit; arguments as :meth:`VisionRememberHandle.push_to_hub` has them.

    Returns:
        The commit's URL; None on processes that share a model with the one that uploads.

    Raises:
        ValueError: no repository id.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    checked_repo_id(repo_id)
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(attachment, parts, folder, shown_as=repo_id)
        if not (Path(folder) / CONFIG_FILE).is_file():
            return None
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            allow_patterns=FILES,
        )
    return str(commit.pr_url if create_pr else commit.commit_url)


def fetch_adapter(repo_id: str, revision: str | None) -> Path:
    """The folder of the cache that holds a repository's adapter; nothing but :data:`FILES` is fetched.

    Args:
        repo_id: "owner/name".
        revision: a branch, a tag or a commit; None for the main branch.

    Raises:
        FileNotFoundError: no such repository or revision, or none that this user may see.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} is neither a folder here nor a repository on the hub that you may see (private ones need "
            "`hf auth login`)"
        ) from error


def checked_repo_id(name: str) -> str:
    """``name`` if it can be a repository's.

    Raises:
        ValueError: it is something else, a path for instance.
    """
    if not isinstance(name, str) or not is_repo_id(name):
        raise ValueError(f"repo_id={name!r}: expected 'owner/name'")
    return name
