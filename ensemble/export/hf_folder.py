"""An ensemble as a folder for the Hugging Face hub: weights, configuration, code, and a model card.

config.json, model.safetensors   what EnsembleModule.from_pretrained reads
ninefold_model/                  the code, see package.py
requirements.txt                 the packages that it needs
README.md                        the model card
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from upath import UPath

from ensemble.export.card import write_card
from ensemble.export.check import Runtime
from ensemble.export.model import EnsembleModule
from ensemble.export.package import describe_model, open_package, requirements, write_package
from ensemble.file import Ensemble
from trainables.errors import UserError


def write_hf(
    module: EnsembleModule, runs: Sequence[UPath], ensemble: Ensemble, folder: Path, repository: str | None
) -> Runtime:
    """Write the folder, and open what it holds."""
    folder.mkdir()
    config = {"library_name": "ninefold", **describe_model(runs, ensemble)}
    write_package(folder, module, config, code=folder)
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(write_card(runs, ensemble, repository), encoding="utf-8")
    return open_package(folder, code=folder).probabilities


def check_push(repository: str) -> None:
    """Raise UserError when a folder could not be pushed there: before any work is done."""
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(f"--push is {repository[:80]!r}, expected OWNER/NAME of a repository on the hub") from None
    if not get_token():
        raise UserError("--push needs a token of the hub; set HF_TOKEN, or log in with: hf auth login")


def push(folder: Path, repository: str) -> str:
    """Upload the folder, to a repository that is made private where there is none; returns its address."""
    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="An ensemble of Ninefold")
    except Exception as error:  # huggingface_hub's own, those of its HTTP library, OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{folder} is written, but could not be pushed to {repository} ({reason}); try again") from None
    return str(url)
