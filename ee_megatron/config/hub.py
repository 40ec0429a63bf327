"""Models and data sets by their id on the Hugging Face hub: OWNER/NAME[:CONFIGURATION][@REVISION].

The command line resolves an id once, to the commit that it stands for, and fetches its files into huggingface-hub's
cache. The settings then hold OWNER/NAME@COMMIT: stages are identified by it, and every later process (rank, actor, job)
reads the files from the cache.
"""

from __future__ import annotations

import functools
import re
import sys
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .errors import Faults, lines_of, refuse

ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?(?:@([\w./-]+))?", re.ASCII)
PLACES = ("configs", "data", "datasets", "exports", "models", "runs", "spaces")
"""What paths to local models, data and results begin with; never taken for an owner at the hub."""
FILES = (".jsonl", ".json", ".parquet", ".yaml")
SMALL = {"model": ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "README.md"], "dataset": ["README.md"]}
LARGE = {
    "model": ["model*.safetensors"],
    "dataset": ["*.parquet", "*.jsonl", "*.json", "*.arrow", "*.csv", "*.gz", "*.zst"],
}
"""Patterns of files by kind: what a dry run looks at, and what only a run needs."""
pending: dict[str, str] = {}
"""Pinned ids -> description of what is still at the hub, because `pin` was not to fetch it; "" for nothing."""


class HubId(NamedTuple):
    """A parsed id; "": no configuration or revision was given."""

    repo: str
    configuration: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo}{self.configuration and f':{self.configuration}'}{self.revision and f'@{self.revision}'}"

    @property
    def pinned(self) -> bool:
        return re.fullmatch("[0-9a-f]{40}", self.revision) is not None


def parse(path: str | Path) -> HubId | None:
    """The hub id that a setting or option holds; None for a local path, also for one of the same name as an id."""
    found = ID.fullmatch(str(path))
    if not found or found[1].split("/")[0] in PLACES or Path(path).suffix in FILES or Path(path).exists():
        return None
    return HubId(found[1], found[2] or "", found[3] or "")


def directory(path: str | Path, kind: str = "model") -> Path:
    """The directory in the cache of an id with its commit; any other path itself. No network."""
    hub = parse(path)
    if hub is None or not hub.pinned:
        return Path(path)
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"{kind}s--{hub.repo.replace('/', '--')}", "snapshots", hub.revision)


def repo_of(path: Path) -> str:
    """The id of the model whose files the cache has at `path`; "" for any other directory."""
    *_, repo, snapshots, _ = ("", "", *path.absolute().parts)
    return repo.removeprefix("models--").replace("--", "/") if snapshots == "snapshots" else ""


def pin(setting: str, path: str, kind: str = "model", whole: bool = True) -> str:
    """A hub id with its commit, its files being in the cache; a local path unchanged. `kind`: model or dataset.

    The hub is asked, once in a process, unless the id has its commit and the files are there; if it can't be reached,
    the commit is the one that the cache has for the revision. Not `whole`: without LARGE files (`pending`).
    Raises Faults (a ValueError) with one line: what was found, what is expected, what to do.
    """
    hub = parse(path)
    pinned, fault = (path, "") if hub is None else _pinned(hub, kind, whole)
    refuse([f"{setting}={path}: {fault}"] if fault else [])
    return pinned


@functools.cache
def _pinned(hub: HubId, kind: str, whole: bool) -> tuple[str, str]:
    """(the id with its commit, "what is wrong")."""
    from huggingface_hub import constants, utils

    # Else most requests would wait for ever.
    utils.get_session().timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    (utils.enable_progress_bars if whole and sys.stderr.isatty() else utils.disable_progress_bars)()
    try:
        hub, left = _fetch(hub, kind, whole)
    except Faults as error:
        return "", str(error)
    except Exception as error:  # Those of half a dozen libraries.
        return "", _reason(hub, kind, error)
    pending[str(hub)] = left and f"{hub.repo}: {left}, downloaded when the run starts"
    return str(hub), ""


def _fetch(hub: HubId, kind: str, whole: bool) -> tuple[HubId, str]:
    """(the id with its commit, size of what is left at the hub or "")."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    if hub.configuration and kind == "model":
        refuse(["a model has no configurations; expected OWNER/NAME or OWNER/NAME@REVISION"])
    get = partial(snapshot_download, hub.repo, repo_type=kind, ignore_patterns=["*/*"] if kind == "model" else None)

    def is_complete(commit: str) -> bool:
        with suppress(errors.LocalEntryNotFoundError):
            found = get(revision=commit, allow_patterns=SMALL[kind] + LARGE[kind], local_files_only=True)
            return kind != "model" or any(Path(found).glob(*LARGE[kind]))
        return False

    if hub.pinned and is_complete(hub.revision):
        return hub, ""
    revision, timeout, trouble = hub.revision or None, constants.HF_HUB_ETAG_TIMEOUT, None
    size = "files"
    try:
        info: Any = HfApi().repo_info(hub.repo, repo_type=kind, revision=revision, files_metadata=True, timeout=timeout)
        large = [f.size or 0 for f in info.siblings or () if any(fnmatch(f.rfilename, part) for part in LARGE[kind])]
        size = f"{sum(large) / 1e6:,.2f} MB"
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception as error:
        trouble = error
    try:
        folder = get(revision=revision, allow_patterns=SMALL[kind], local_files_only=trouble is not None)
    except errors.LocalEntryNotFoundError as error:
        raise trouble or error from None
    if trouble and not constants.HF_HUB_OFFLINE:
        print(f"{hub}: the hub did not answer ({lines_of(trouble)[0]}); using the cache", file=sys.stderr)
    hub = hub._replace(revision=Path(folder).name)
    if whole and not is_complete(hub.revision):
        print(f"{hub}: downloading {size}", file=sys.stderr, flush=True)
        get(revision=hub.revision, allow_patterns=LARGE[kind])
        if not is_complete(hub.revision):
            refuse([f"no {LARGE[kind][0]} there; expected weights as safetensors; name another revision or model"])
    return hub, "" if is_complete(hub.revision) else size


def _reason(hub: HubId, kind: str, error: BaseException) -> str:
    """Why the hub gave nothing, and what to do."""
    from huggingface_hub import constants, errors

    page, local = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{hub.repo}", "neither a path here nor"
    reasons = {
        errors.GatedRepoError: f"gated; accept its terms at {page} and log in (`hf auth login` or HF_TOKEN)",
        errors.RevisionNotFoundError: f"{page} has no such revision; expected a branch, a tag or a whole commit hash",
        errors.RepositoryNotFoundError: f"{local} public at {page}; check the name, or log in (HF_TOKEN)",
        errors.OfflineModeIsEnabled: f"{local} (all) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
        f"unset it, or run `hf download --repo-type {kind} {hub.repo}` where there is a network",
    }
    cause: BaseException | None = error
    while cause is not None:
        for one, text in reasons.items():
            if isinstance(cause, one):
                return text
        cause = cause.__cause__ or cause.__context__
    return f"{local} at {page} ({lines_of(error)[0][:200]}); check the network, or name a local path"
