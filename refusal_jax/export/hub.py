"""Shares an export on the Hugging Face hub, privately unless asked otherwise."""

import pathlib

from refusal_jax.errors import UserError, setting
from refusal_jax.export.provenance import check


def hub_api():
    """Returns the hub's client."""
    from huggingface_hub import HfApi  # imported late: this is slow, and few exports are pushed

    return HfApi()


def push(folder: pathlib.Path, repository: str, public: bool = False, api=None) -> str:
    """Uploads a verified export to a model repository, which is made if it is not there, and returns its address.

    Raises UserError for files that are not as exported, an existing repository that is public although `public` is not
    set, and a hub that cannot be reached or does not know the user.
    """
    check(folder)
    api = api or hub_api()
    try:
        url = api.create_repo(repository, repo_type="model", private=not public, exist_ok=True)
        seen = not getattr(api.repo_info(repository, repo_type="model"), "private", False)
    except Exception as error:  # the client raises many types: for names, tokens, networks, HTTP
        raise cannot_push(folder, repository, error) from None
    if seen and not public:
        raise UserError(
            f"{repository} is a public repository, so nothing was uploaded. Pass {setting('public')} if everyone may have the "
            "export, or another name."
        )
    try:
        api.upload_folder(
            folder_path=str(folder),
            repo_id=repository,
            repo_type="model",
            commit_message="Add an export of refusal_jax",
        )
    except Exception as error:
        raise cannot_push(folder, repository, error) from None
    return str(url)


def cannot_push(folder: pathlib.Path, repository: str, error: Exception) -> UserError:
    """Returns the error for a push that failed, with how to repeat it."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(
        f"The export is whole in {folder}, but could not be pushed to {repository} ({reason}). Log in with `hf auth login`, or "
        f"set HF_TOKEN to a token that may write, check name and network, and push it again: `refusal-jax export "
        f"--check={folder} --push_to_hub={repository}`"
    )
