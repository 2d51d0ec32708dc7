"""Puts an export into a repository on the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import TrainingError

if TYPE_CHECKING:
    from trainer.config.train import ReportConfig

# Weights and text: no training state, which is pickle, and nothing that happens to lie there.
PATTERNS = (
    "*.safetensors", "*.json", "*.jsonl", "*.jinja", "*.txt", "*.md", "report.html", "plots/*.png",
)  # fmt: skip
# They hold texts of the held-out pairs and local paths: pushed where `report.push_report` is set.
PRIVATE = ("report.html", "resolved_config.json")


class PushError(TrainingError):
    """The export is there, but not on the hub; the message says how to try again."""


def check_push(repository: str) -> None:
    """Raise ValueError if it is no repository's name, or if there is no token to log in with."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"report.push_to_hub is {repository!r}: {error}") from None
    if get_token() is None:
        raise ValueError(
            f"report.push_to_hub is {repository!r}, but there is no token that may write there: "
            "run `hf auth login` or set HF_TOKEN"
        )


def push(export_dir: Path, config: ReportConfig) -> str:
    """Upload an export to `config.push_to_hub`; the address of the commit. The repository is made
    if it is not there, private or not. Raises PushError, with the export as it was."""
    from huggingface_hub import HfApi

    assert config.push_to_hub is not None
    repository, private = config.push_to_hub, config.hub_private
    withheld = [] if config.push_report else list(PRIVATE)
    try:
        api = HfApi()
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name,
            folder_path=export_dir,
            allow_patterns=list(PATTERNS),
            ignore_patterns=withheld,
            commit_message="Reward model",
        )
        return commit.commit_url
    # Its errors come from several libraries, and whichever it is, the model is trained.
    except Exception as error:
        visibility = "--private" if private else "--no-private"
        chosen = [f"--include {shlex.quote(pattern)}" for pattern in PATTERNS]
        chosen += [f"--exclude {shlex.quote(name)}" for name in withheld]
        raise PushError(
            f"the reward model is in {export_dir}, but it could not be pushed to {repository} "
            f"({type(error).__name__}: {error}). Try again:\n"
            f"hf upload {shlex.quote(repository)} {shlex.quote(str(export_dir))} . {visibility} "
            f"{' '.join(chosen)}"
        ) from error
