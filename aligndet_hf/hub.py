"""
The Hugging Face Hub: repositories that are known to accept an upload before any work begins, one commit per upload.

Tokens come from `hf auth login` or `HF_TOKEN` (or `hub_token` of `TrainingArguments`); none is ever printed or stored.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .arguments import Arguments, again
from .cards import merge_card
from .flags import flag


@dataclass(kw_only=True)
class HubArguments(Arguments):
    """What commands that upload a result have in common; they inherit it."""

    push_to_hub: bool = flag(False, "output", "upload the result to the Hub")
    hub_private_repo: bool | None = flag(
        None,
        "output",
        "make a new repository private (also if not given) or, with false, public; true refuses one that is public",
    )
    hub_revision: str | None = flag(None, "output", "branch to upload to; main if not given")
    push_pictures: bool = flag(False, "output", "upload the pictures of your images in the report as well")
    card_license: str | None = flag(
        None, "output", "licence of what is uploaded, for its card, by its Hub name, e.g. apache-2.0"
    )


@dataclass(kw_only=True)
class HubModelArguments(HubArguments):
    """Of commands that upload a model."""

    hub_model_id: str | None = flag(None, "output", "Hub repository, `user/name`; the name of output_dir if not given")


@dataclass(kw_only=True)
class HubDatasetArguments(HubArguments):
    """Of commands that upload a data set."""

    hub_dataset_id: str | None = again(HubModelArguments, "hub_model_id")


def open_repository(arguments: HubArguments, output_dir: Path, repo_type: str = "model") -> str | None:
    """
    Creates the repository to upload to, if there is none, and makes sure that it can be written to.

    To be called before the work whose result it shall hold: a run of days must not end at a missing token.

    Args:
        arguments ([`HubArguments`]): Whether to upload at all, and where to. A repository that is made is private if
            nothing is said; one that is there stays as it is. A branch that is not there is made. Of other dataclasses
            `hub_token` counts too, instead of the token of `hf auth login` or `HF_TOKEN`.
        output_dir (`Path`): The folder of the result, after which a repository without a name is called.
        repo_type (`str`, *optional*, defaults to `"model"`): Or "dataset".

    Returns:
        `str`: its id, `owner/name`; `None` if nothing is to be uploaded.

    Raises:
        OSError: no token, no permission, no such owner, no connection: with what to do about it.
        ValueError: it shall be private and is public, or the Hub does not know the licence.
    """
    from huggingface_hub import HfApi, get_session

    if not arguments.push_to_hub:
        return None
    name = getattr(arguments, f"hub_{repo_type}_id") or output_dir.name
    private, revision, license = arguments.hub_private_repo, arguments.hub_revision, arguments.card_license
    token = getattr(arguments, "hub_token", None)
    api = HfApi(token=token)
    with clear_hub_errors(name, token):
        repo_id = api.create_repo(name, repo_type=repo_type, private=private is not False, exist_ok=True).repo_id
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        if license is not None:
            # Not `RepoCard.validate`, which before huggingface_hub 2 asks huggingface.co whatever HF_ENDPOINT says.
            card = {"content": f"---\nlicense: {license}\n---\n", "repoType": repo_type}
            if get_session().post(f"{api.endpoint}/api/validate-yaml", json=card).status_code == 400:
                raise ValueError(f"card_license: the Hub does not know the licence {license!r}")
        is_public = private and not api.repo_info(repo_id, repo_type=repo_type).private
    if is_public:
        raise ValueError(f"{repo_id} is to be private, but is there and public: make it private on the Hub first")
    return repo_id


def upload(
    repo_id: str,
    files: Mapping[str, Path],
    card: str,
    *,
    message: str,
    local_card: Path | None = None,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Uploads files and a card in one commit: all of it is there afterwards, or nothing has changed.

    The card that is there keeps what a person wrote in it, see [`~aligndet_hf.cards.merge_card`]. Large files come
    first and are not sent again when an upload that broke off is repeated.

    Args:
        repo_id (`str`): `owner/name`, see [`open_repository`].
        files (`Mapping[str, Path]`): Path in the repository to the file to upload.
        card (`str`): The generated card, with metadata.
        local_card (`Path`, *optional*): A card to take what a person wrote from, where the Hub's has nothing.
        message (`str`): The commit message.
        repo_type (`str`, *optional*, defaults to `"model"`): Or "dataset".
        revision (`str`, *optional*): The branch to write to.
        token (`str`, *optional*): By default the token of `hf auth login` or `HF_TOKEN`.

    Returns:
        `str`: address of the repository.

    Raises:
        OSError: the upload failed: with the reason, and what to do about it.
        ValueError: a card has metadata that cannot be read, or the Hub refuses the new one.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi(token=token, library_name="aligndet_hf")
    place = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
    operations = [CommitOperationAdd(path, file) for path, file in sorted(files.items())]
    with clear_hub_errors(repo_id, token):
        api.preupload_lfs_files(additions=operations, free_memory=False, **place)
        # From here on nobody else may change the card: the commit is refused if its parent is no longer the last one.
        parent = api.repo_info(**place).sha
        cards = []
        with contextlib.suppress(EntryNotFoundError):
            cards.append(Path(api.hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=parent)))
    if local_card is not None and local_card.exists():
        cards.append(local_card)
    card = merge_card(card, *(path.read_text(encoding="utf-8") for path in cards))
    operations.append(CommitOperationAdd("README.md", card.encode()))
    with clear_hub_errors(repo_id, token):
        api.create_commit(operations=operations, commit_message=message, parent_commit=parent, **place)
    return f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"


@contextlib.contextmanager
def clear_hub_errors(repo_id: str, token: str | None = None) -> Iterator[None]:
    """
    One `OSError` in one line, without the token, for all ways in which talking to the Hub fails.

    Args:
        repo_id (`str`): The repository.
        token (`str`, *optional*): The token in use; by default the token of `hf auth login` or `HF_TOKEN`.
    """
    from huggingface_hub import get_token

    try:
        yield
    except ValueError:  # such as a name that none can have, or metadata that the Hub refuses: says so itself
        raise
    except Exception as error:  # of the Hub client, its HTTP client, and its threads: each has its own
        token = token or get_token()
        causes, cause = [error], error
        while cause := cause.__cause__:
            causes.append(cause)
        status = next((s for e in causes if (s := getattr(getattr(e, "response", None), "status_code", None))), None)
        if token is None:
            reason = "there is no token: run `hf auth login`, or set HF_TOKEN"
        elif status == 401:
            reason = "the Hub does not accept the token: run `hf auth login` again, or set HF_TOKEN"
        elif status in (403, 404):
            reason = (
                f"the token may not write there, or there is no such owner ({status}): give a repository of your own, "
                "or a token with the role `write`"
            )
        elif status == 412:
            reason = "somebody changed the repository meanwhile: run the same command again"
        else:
            answer = next((words for e in causes if (words := getattr(e, "server_message", None))), None)
            words = (answer or str(causes[-1])).strip().partition("\n")[0] or type(causes[-1]).__name__
            reason = f"{words.rstrip('.')}. What has been sent is kept: run the same command again"
        message = f"cannot upload to {repo_id}: {reason}".replace(token or "\0", "<token>")
        leaks = any(token and token in str(e) for e in causes)
        raise OSError(message) from (None if leaks else error)
