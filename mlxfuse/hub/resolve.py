"""A model reference becomes a path: a local file, a file of a hub repository, the demo model.

What a hub lists is untrusted: names are checked before they are used, and nothing of it
reaches the file system but through ``huggingface_hub``'s cache.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..errors import DownloadError, ModelRefError
from ..gguf.exported import is_export
from ..terminal import one_line
from .demo import ensure_demo
from .download import Progress, fetch

DEFAULT_QUANT = "Q4_K_M"
MAX_SHARDS = 1000

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
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})")
# The quantisation stands at the end of a file's name: model-Q4_K_M, model.i1-IQ3_XXS, UD-Q2_K_XL.
_QUANT = re.compile(
    r"(?:^|[-._])(?P<quant>(?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F(?:P)?(?:16|32)))$",
    re.IGNORECASE,
)
# Files beside a model that are not the model.
_COMPANION = re.compile(
    r"(?:^|[-._/])(?:mmproj|imatrix|draft|mtp|eagle3?)(?:[-._/]|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Ref:
    """A parsed hub reference; ``choice`` is a quantisation, a file's name, or None."""

    repo: str
    revision: str | None
    choice: str | None


@dataclass(frozen=True)
class Candidate:
    """One model of a repository: its quantisation, if its name tells, and all its shards."""

    quant: str | None
    files: tuple[str, ...]


def resolve(
    ref: str | None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The path of the GGUF file (its first shard) that ``ref`` names, downloaded if need be and
    ``HF_HUB_OFFLINE`` does not forbid it.

    Args:
        ref: a path; ``org/repo[@revision][:choice]``, also with ``hf.co/``, ``hf:`` or the
            address of a file's page in front, where ``choice`` is a quantisation or a file's
            name in any case (default: Q4_K_M, or the only model there is); None for the
            demo model. A path that exists wins.
        revision: branch, tag or commit of the repository.
        progress: called as (label, bytes done, bytes in all).

    Raises:
        ModelRefError: nothing has that name, or several things have.
        DownloadError: the file is not here and cannot be downloaded.
    """
    if ref is None:
        return ensure_demo(progress=progress, offline=_hub_offline())
    path = Path(ref).expanduser()
    try:
        mode = path.stat().st_mode if ref else None
    except (OSError, ValueError):
        mode = None
    if mode is not None:
        if not (stat.S_ISREG(mode) or is_export(path)):
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ModelRefError(
                f"{one_line(ref)} is {what}; expected a .gguf file, "
                "or a folder that mlxfuse export wrote"
            )
        if revision:
            raise ModelRefError(f"{one_line(ref)} is a file: a revision is for hub repositories")
        return path
    parsed = parse(ref)
    if revision and parsed.revision and revision != parsed.revision:
        raise ModelRefError(f"two revisions are given: {parsed.revision} and {revision}")
    wanted = Ref(parsed.repo, revision or parsed.revision, parsed.choice)
    if _hub_offline():
        return _from_cache(wanted)
    return _from_hub(wanted, progress)


def parse(ref: str) -> Ref:
    """Read a hub reference.

    Raises:
        ModelRefError: it can only be a path, and there is no such file, or it is neither.
    """
    prefix = _HUB_PREFIX.match(ref)
    rest = ref[prefix.end() :] if prefix else ref
    match = _REPO.fullmatch(rest.rstrip("/")) or (_FILE_PAGE.fullmatch(rest) if prefix else None)
    if match and (prefix or ":" in rest or not rest.lower().endswith(".gguf")):
        return Ref(match["repo"], match["revision"], match["choice"])
    raise ModelRefError(
        f"{one_line(ref)}: no such file; expected the path of a .gguf file "
        "or a hub repository such as org/repo:Q4_K_M"
    )


def candidates(names: Iterable[str]) -> list[Candidate]:
    """The models among a repository's file names; incomplete shard sets are left out.

    Projectors, importance matrices and draft models are never among them.
    """
    found: list[Candidate] = []
    shards: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(set(names)):
        if not _is_safe(name) or not name.lower().endswith(".gguf"):
            continue
        stem = name[: -len(".gguf")]
        if _COMPANION.search(stem):
            continue
        if shard := _SHARD.fullmatch(stem):
            key = (shard["stem"], int(shard["count"]))
            shards.setdefault(key, {})[int(shard["index"])] = name
        else:
            found.append(Candidate(_quant(stem), (name,)))
    for (stem, count), parts in shards.items():
        if count <= MAX_SHARDS and sorted(parts) == list(range(1, count + 1)):
            found.append(Candidate(_quant(stem), tuple(parts[i] for i in sorted(parts))))
    return found


def _quant(stem: str) -> str | None:
    match = _QUANT.search(stem.rpartition("/")[2])
    return match["quant"].upper() if match else None


def _is_safe(name: str) -> bool:
    """Whether a listed name is a plain relative path of printable characters."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and len(name) <= 1000
        and all(0 < len(part.encode()) <= 255 and part not in (".", "..") for part in parts)
    )


def choose(ref: Ref, names: Sequence[str]) -> tuple[str, ...]:
    """The file names, in shard order, of the one model that ``ref`` names.

    Raises:
        ModelRefError: none or several match; the message lists what there is.
    """
    models = candidates(names)
    if ref.choice is None:
        wanted = DEFAULT_QUANT
        matches = [m for m in models if m.quant == wanted] or (models if len(models) == 1 else [])
    else:
        wanted = ref.choice
        # A draft model is there for who names its file: --draft-model needs it.
        named = [n for n in names if _is_safe(n) and n.lower().endswith(".gguf")]
        matches = [m for m in models if (m.quant or "").lower() == wanted.lower()]
        matches = matches or [m for m in models if _has_file(m, wanted)]
        matches = matches or [
            Candidate(None, (n,)) for n in named if _has_file(Candidate(None, (n,)), wanted)
        ]
    if len(matches) == 1:
        return matches[0].files
    if not models:
        raise ModelRefError(f"{ref.repo} has no complete GGUF model")
    listed = sorted({_label(m, models) for m in (matches or models)}, key=str.lower)
    problem = "names several models" if matches else "is not there"
    raise ModelRefError(
        f"{ref.repo}: {one_line(wanted)} {problem}; choose with {ref.repo}:NAME among\n  "
        + "\n  ".join(one_line(label) for label in listed)
    )


def _has_file(model: Candidate, wanted: str) -> bool:
    first = model.files[0].lower()
    return wanted.lower() in (first, first.rpartition("/")[2])


def _label(model: Candidate, models: Sequence[Candidate]) -> str:
    """The quantisation where it is enough to name the model, else its first file."""
    if model.quant and sum(m.quant == model.quant for m in models) == 1:
        return model.quant
    return model.files[0]


def _hub_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _from_hub(ref: Ref, progress: Progress | None) -> Path:
    """Download what ``ref`` names, every shard at the same commit."""
    from huggingface_hub.errors import HfHubHTTPError

    # The root error class of the HTTP library that this huggingface_hub uses.
    transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        commit, names = _listing(ref)
        files = choose(ref, names)
        paths = [_file_from_hub(ref.repo, name, commit, progress) for name in files]
    except HfHubHTTPError as error:
        raise DownloadError(_refusal(ref, error)) from error
    except (transport_error, OSError) as error:
        raise DownloadError(
            f"{ref.repo}: the hub cannot be reached ({error}); "
            "HF_HUB_OFFLINE=1 uses what is already downloaded"
        ) from error
    return paths[0]


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


def _refusal(ref: Ref, error: OSError) -> str:
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
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [
            r for r in scan_cache_dir().repos if (r.repo_type, r.repo_id) == ("model", ref.repo)
        ]
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
            return names[choose(ref, list(names))[0]]
        except ModelRefError as error:
            missing = missing or error
    raise DownloadError(
        f"{ref.repo} is not in the cache, and offline mode is on: unset HF_HUB_OFFLINE to "
        "download it" + (f"\n{missing}" if missing else "")
    )
