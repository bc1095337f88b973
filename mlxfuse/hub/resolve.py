"""A model reference becomes a path: a local file, a file of a hub repository, the demo model.

What a hub lists is untrusted: names are checked before they are used, and nothing of it
reaches the file system but through ``huggingface_hub``'s cache.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..errors import DownloadError, ModelRefError
from ..terminal import one_line
from .demo import ensure_demo
from .download import Progress, fetch
from .folders import candidates, checkpoint_files, choose, in_folder, is_complete

_HUB_PREFIX = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/|hf:(?://)?)", re.IGNORECASE
)
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPO = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[\w./-]+))?(?::(?P<choice>[^:]+))?", re.ASCII
)
_FILE_PAGE = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})/(?:blob|resolve)/(?P<revision>[\w.-]+)/(?P<choice>[^?#]+)"
    r"(?:[?#].*)?",
    re.ASCII,
)


@dataclass(frozen=True)
class Ref:
    """A parsed hub reference; ``choice`` is a quantisation, a file's name, or None."""

    repo: str
    revision: str | None
    choice: str | None


def resolve(
    ref: str | None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """The path of what ``ref`` names, downloaded if need be and ``HF_HUB_OFFLINE`` does not
    forbid it: a GGUF file (its first shard), or the folder of an export or of an MLX-LM checkpoint.

    Args:
        ref: a path, also of a folder with GGUF files and ``folder:choice``;
            ``org/repo[@revision][:choice]``, also with ``hf.co/``, ``hf:`` or the address of a
            file's page in front, where ``choice`` is a quantisation or a file's name in any case
            (default: the only model there is, or Q4_K_M); None for the demo model. A path that
            exists wins.
        revision: branch, tag or commit of the repository.
        progress: called as (label, bytes done, bytes in all).
        note: called where the hub cannot be reached and what is cached is used.

    Raises:
        ModelRefError: nothing has that name, or several things have.
        DownloadError: the file is not here and cannot be downloaded.
    """
    if ref is None:
        return ensure_demo(progress=progress, offline=_hub_offline())
    here = _local(ref)
    if here is not None:
        if revision:
            raise ModelRefError(f"{one_line(ref)} is a file: a revision is for hub repositories")
        return here
    parsed = parse(ref)
    if revision and parsed.revision and revision != parsed.revision:
        raise ModelRefError(f"two revisions are given: {parsed.revision} and {revision}")
    wanted = Ref(parsed.repo, revision or parsed.revision, parsed.choice)
    if _hub_offline():
        return _from_cache(wanted)
    return _from_hub(wanted, progress, note)


def _local(ref: str) -> Path | None:
    """What is at a path, or in the folder of ``folder:choice``; None where nothing is."""
    for text, choice in ((ref, None), ref.rpartition(":")[::2]):
        path = Path(text).expanduser()
        try:
            mode = path.stat().st_mode if text else None
        except (OSError, ValueError):
            mode = None
        if mode is None or (choice is not None and not (choice and stat.S_ISDIR(mode))):
            continue
        if stat.S_ISDIR(mode):
            return in_folder(path, choice)
        if not stat.S_ISREG(mode):
            raise ModelRefError(
                f"{one_line(ref)} is not a regular file; expected a .gguf file or a folder"
            )
        return path
    return None


def parse(ref: str) -> Ref:
    """Read a hub reference.

    Raises:
        ModelRefError: it can only be a path, and there is no such file, or it is neither.
    """
    prefix = _HUB_PREFIX.match(ref)
    rest = ref[prefix.end() :] if prefix else ref
    match = _REPO.fullmatch(rest.rstrip("/")) or (_FILE_PAGE.fullmatch(rest) if prefix else None)
    if match and (prefix or not _is_a_path(rest)):
        return Ref(match["repo"], match["revision"], match["choice"])
    raise ModelRefError(
        f"{one_line(ref) or 'an empty name'}: no such file; expected the path of a .gguf file or "
        "a folder, or a hub repository such as org/repo:Q4_K_M"
    )


def _is_a_path(ref: str) -> bool:
    """Whether someone who writes this means a path: it ends so, or begins in a folder here."""
    if ":" not in ref and ref.lower().endswith(".gguf"):
        return True
    return Path(ref.partition("/")[0]).is_dir()


def _hub_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _from_hub(ref: Ref, progress: Progress | None, note: Callable[[str], None] | None) -> Path:
    """Download what ``ref`` names, every file at the same commit."""
    from huggingface_hub.errors import HfHubHTTPError

    # The root error class of the HTTP library that this huggingface_hub uses.
    transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        commit, names = _listing(ref)
        files, in_whole = _files(ref, names)
        paths = [_file_from_hub(ref.repo, name, commit, progress) for name in files]
    except (transport_error, OSError) as error:
        refused = isinstance(error, HfHubHTTPError)
        if refused and getattr(getattr(error, "response", None), "status_code", 0) < 500:
            raise DownloadError(_refusal(ref, error)) from error
        try:
            cached = _from_cache(ref)
        except DownloadError:
            raise DownloadError(
                f"{ref.repo}: the hub cannot be reached ({one_line(str(error), 300)}), it is not "
                "in the cache, and there is no such file or folder here"
            ) from error
        if note is not None:
            note(f"{ref.repo}: the hub cannot be reached; using what is cached")
        return cached
    return paths[0].parent if in_whole else paths[0]


def _files(ref: Ref, names: Sequence[str]) -> tuple[Sequence[str], bool]:
    """The files that ``ref`` means, and whether their folder is the model: a checkpoint."""
    checkpoint = checkpoint_files(names)
    if checkpoint and not candidates(names):
        if ref.choice is not None:
            raise ModelRefError(
                f"{ref.repo} is an MLX-LM checkpoint, which has no {one_line(ref.choice)}: leave "
                f"out what is behind the colon"
            )
        return checkpoint, True
    return choose(ref.repo, ref.choice, names), False


def _listing(ref: Ref) -> tuple[str, list[str]]:
    """The commit that ``ref`` means now, and the names of its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(ref.repo, revision=ref.revision)
        names = [s.rfilename for s in info.siblings or []]
        good = bool(re.fullmatch(r"[0-9a-f]{40}", info.sha or ""))
    except HfHubHTTPError:
        raise  # a refusal, some of which are ValueErrors too
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"{ref.repo}: the hub's listing cannot be read ({error})") from error
    if not good or not info.sha or not all(isinstance(name, str) for name in names):
        raise DownloadError(f"{ref.repo}: the hub's listing has no commit or no file names")
    return info.sha, names


def _refusal(ref: Ref, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"{ref.repo} is gated: accept its terms on the hub, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{ref.repo}: no such repository, or it is private and HF_TOKEN does not open it"
    if isinstance(error, RevisionNotFoundError):
        return f"{ref.repo} has no revision {ref.revision}"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"{ref.repo}: the hub refuses access; set HF_TOKEN to a token that may read it"
    return f"{ref.repo}: {one_line(str(error), 400)}"


def _file_from_hub(repo: str, name: str, commit: str, progress: Progress | None) -> Path:
    """One file in huggingface_hub's cache, so that other tools find it there too.

    huggingface_hub starts a download anew when its process was killed, so the content is
    brought by ``fetch``, which continues, to where the cache keeps it; ``hf_hub_download``
    then finds it and adds its entry.
    """
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    cached = try_to_load_from_cache(repo, name, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    url = hf_hub_url(repo, name, revision=commit)
    found = get_hf_file_metadata(url)
    etag, size = found.etag, found.size
    # A large file's etag is its sha256. Anything else (or too large for plain HTTP) is left
    # to huggingface_hub.
    if etag and size and re.fullmatch(r"[0-9a-f]{64}", etag) and size <= 50_000_000_000:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
        fetch(
            url,
            folder / "blobs" / etag,
            size=size,
            sha256=etag,
            headers=build_hf_headers(),
            label=name.rpartition("/")[2],
            progress=progress,
        )
    return Path(hf_hub_download(repo, name, revision=commit))


def _from_cache(ref: Ref) -> Path:
    """What ``ref`` names among the files that huggingface_hub's cache holds."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
        repos = [r for r in cached if (r.repo_type, r.repo_id) == ("model", ref.repo)]
    except CacheNotFound:
        repos = []
    snapshots = [s for repo in repos for s in repo.revisions]
    if ref.revision:
        snapshots = [
            s for s in snapshots if ref.revision in s.refs or s.commit_hash == ref.revision
        ]
    missing: ModelRefError | None = None
    for snapshot in sorted(snapshots, key=lambda s: s.last_modified, reverse=True):
        names: dict[str, Path] = {
            f.file_path.relative_to(snapshot.snapshot_path).as_posix(): f.file_path
            for f in snapshot.files
        }
        try:
            files, in_whole = _files(ref, list(names))
            if not in_whole:
                return names[files[0]]
            if is_complete(snapshot.snapshot_path, names):
                return Path(snapshot.snapshot_path)
        except ModelRefError as error:
            missing = missing or error
    raise DownloadError(
        f"{ref.repo} is not in the cache, and offline mode is on: unset HF_HUB_OFFLINE to "
        "download it" + (f"\n{missing}" if missing else "")
    )
