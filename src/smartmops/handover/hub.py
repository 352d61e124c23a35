"""A run's adapter on the hub: what goes there, and that nothing of this machine goes along. Knows no model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from smartmops.base.names import shown_name
from smartmops.checks.errors import HubError
from smartmops.methods.baselines import template_of, tokenizer_of
from smartmops.options.finished.handover import PushConfig
from smartmops.runs.card import ORIGINS, card
from smartmops.runs.folder import PATHS, Run, check_adapter
from smartmops.tokens.template import FILE, Template

CARRIED = ("adapter_config.json", "adapter_model.safetensors", FILE)
NAMES = ("expert_names", "frozen_experts")  # fields whose texts users chose: /r/science is a task, and no path
MODELS = ("base_model_name_or_path", "tokenizer_name_or_path", "embedder")  # fields of PEFT's configs and ours
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


def push(config: PushConfig) -> dict[str, Any]:
    """Put a run's adapter, its template and its card into a repository of the hub, which is made where it is not there.

    Returns:
        `repo`, `files` {name: bytes}, and `url`, None where `dry_run` only asks what would go there.

    Raises:
        FileNotFoundError: there is no finished run, or it has no adapter.
        OSError: the hub cannot be reached, or does not let us write.
        ValueError: the adapter is damaged.
    """
    run = Run.open(config.run)
    check_adapter(run.adapter_dir)
    with tempfile.TemporaryDirectory(prefix="smartmops-push-") as name:
        folder = Path(name)
        stage(run, folder, config.repo)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        url = None if config.dry_run else _upload(folder, config)
    return {"repo": config.repo, "files": files, "url": url}


def stage(run: Run, folder: Path, repo: str) -> None:
    """Write what is to be pushed into an empty folder."""
    for name in CARRIED:
        if (run.adapter_dir / name).is_file():
            shutil.copy(run.adapter_dir / name, folder / name)
    file = folder / "adapter_config.json"
    base, paths = str(run.config["base"]), run.config.get(PATHS, ())
    found = without_folders(json.loads(file.read_text(encoding="utf-8")), paths)
    found["base_model_name_or_path"] = ORIGINS.get(base, shown_name(base, paths))
    file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = Template.of(template_of(run), tokenizer_of(run))
    (folder / "README.md").write_text(card(template, run.config, run.read_metrics(), repo), encoding="utf-8")


def without_folders(value: Any, paths: Collection[str] = ()) -> Any:
    """A JSON value in which no text says where on this machine something lies: the last part of each path is left.

    Which texts may be paths without being spelt as such, their fields say; `paths` are known to be some.
    """
    if isinstance(value, Mapping):
        return {key: shown_name(each, paths) if key in MODELS and isinstance(each, str) else
                each if key in NAMES else without_folders(each, paths) for key, each in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [without_folders(each, paths) for each in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "./", "../"))):
        return Path(value).name
    return value


def _upload(folder: Path, config: PushConfig) -> str:
    """Make the repository and upload the folder; what the hub says is told without what we sent."""
    api = HfApi()
    try:
        api.create_repo(config.repo, private=config.private, exist_ok=True)
        if config.private and api.model_info(config.repo).private is False:
            raise HubError(f"--private: {config.repo} is there already, and everybody can read it: name another, or "
                           "leave --private away")  # fmt: skip
        done = api.upload_folder(repo_id=config.repo, folder_path=folder, commit_message="Add an adapter of smartmops")
    except HubError:
        raise
    except LocalTokenNotFoundError:
        raise HubError(f"no token for {api.endpoint} is on this machine: {LOGIN}") from None
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        way = LOGIN if status in (401, 403) else "try again later"
        raise HubError(f"{api.endpoint} answers {status} for {config.repo}: {way}") from None
    except (OSError, ConnectionError) as error:
        raise HubError(f"{api.endpoint} cannot be reached ({type(error).__name__}): go online and try again") from None
    return str(done.commit_url)
