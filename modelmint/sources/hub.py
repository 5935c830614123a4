"""A repository of the Hugging Face Hub: ``hf:organization/name[@revision]``, through the client of huggingface_hub.

The client's own download is not used: it checks sizes but no digests, and begins every file again in a new process.
Here each file is fetched by ranges into a file that the caller keeps and hashes, so that any process can continue it.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from modelmint import __version__
from modelmint.errors import ModelMintError, NetworkError, SourceError, UnsafeSourceError
from modelmint.recipe import ModelRef
from modelmint.settings import Settings, silence_telemetry
from modelmint.sources import PinnedFile, PinnedRef, clean_path
from modelmint.sources.resume import append, resume
from modelmint.sources.selection import needed

TIMEOUT_SECONDS = 30.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)


def resolve(ref: ModelRef, settings: Settings) -> PinnedRef:
    """Pin a repository by its commit, with the names, sizes and digests that the Hub declares for it.

    Raises:
        SourceError: if the repository or revision is missing, gated or disabled, or the token is wrong.
        UnsafeSourceError: if the token would go to a host that is not trusted, or a file's name leaves its folder.
        NetworkError: if the Hub failed for now.
    """
    hub = Hub(settings)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub.token, library_name="modelmint", library_version=__version__)
    with hub.explained(ref):
        info = api.model_info(ref.location, revision=ref.revision or None, files_metadata=True, timeout=TIMEOUT_SECONDS)
    commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise SourceError(f"{ref}: the Hub answered with {commit!r} where a commit belongs; check HF_ENDPOINT")
    siblings = {clean_path(sibling.rfilename, ref): sibling for sibling in info.siblings or ()}
    wanted = needed(siblings, ref)
    return PinnedRef(
        ref=ref,
        revision=commit,
        files=tuple(_pinned(siblings[path], ref) for path in wanted),
        left_out=tuple(sorted(set(siblings) - set(wanted))),
    )


def _pinned(sibling: Any, ref: ModelRef) -> PinnedFile:
    lfs = sibling.lfs
    digest = f"sha256:{lfs.sha256}" if lfs else None
    if sibling.size is None or not (digest or sibling.blob_id):
        raise SourceError(f"{ref}: the Hub declares no size or digest for {sibling.rfilename}; check HF_ENDPOINT")
    return PinnedFile(
        path=sibling.rfilename, size=sibling.size, digest=digest, git_sha1="" if digest else sibling.blob_id
    )


def fetch(
    pinned: PinnedRef, file: PinnedFile, target: Path, settings: Settings, on_bytes: Callable[[int], None]
) -> None:
    """Write a file, continuing what `target` holds already; a cut connection is taken up again.

    Raises:
        SourceError: if the Hub refuses the file or sends more than it declared.
        NetworkError: if connections kept failing; what came is kept.
    """
    hub = Hub(settings)

    def connect(out: BinaryIO) -> None:
        start = out.tell()
        with (
            hub.explained(pinned.ref, file.path),
            hub.get(pinned, file, f"bytes={start}-" if start else "") as response,
        ):
            if start and response.status_code != 206:
                # The server does not continue: it sends the file from its beginning.
                on_bytes(-start)
                out.truncate(0)
            # As they come: pieces of a fixed size would lose what came before a cut.
            append(str(pinned), file, response.iter_bytes(), out, on_bytes)

    resume(str(pinned), file, target, on_bytes, connect)


def read_range(pinned: PinnedRef, file: PinnedFile, start: int, length: int, settings: Settings) -> bytes:
    """Read part of a file with one request.

    Raises:
        SourceError: if the Hub refuses the file.
        NetworkError: if it failed for now.
    """
    wanted = min(length, file.size - start)
    if wanted <= 0:
        return b""
    hub = Hub(settings)
    content = bytearray()
    with hub.explained(pinned.ref, file.path), hub.get(pinned, file, f"bytes={start}-{start + wanted - 1}") as response:
        skip = 0 if response.status_code == 206 else start
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= skip + wanted:
                break
    if len(content) < skip + wanted:
        raise NetworkError(f"{pinned}: the connection ended after {len(content)} bytes of {file.path}; run again")
    return bytes(content[skip : skip + wanted])


def dataset_commit(ref: ModelRef, settings: Settings) -> str:
    """The commit that a dataset's branch, or its default branch, is at.

    Raises:
        SourceError: if the dataset or revision is missing or gated.
        NetworkError: if the Hub failed for now.
    """
    hub = Hub(settings)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub.token, library_name="modelmint", library_version=__version__)
    with hub.explained(ref):
        return str(api.dataset_info(ref.location, revision=ref.revision or None, timeout=TIMEOUT_SECONDS).sha)


class Hub:
    """The Hub's address and what may be sent there.

    Raises:
        UnsafeSourceError: if there is a token and the address is not one that it may be sent to.
    """

    def __init__(self, settings: Settings) -> None:
        # Before the import: the client decides then whether it reports home.
        silence_telemetry()
        from huggingface_hub import constants

        public = constants.HUGGINGFACE_CO_URL_HOME.rstrip("/")
        self.endpoint = (settings.hf_endpoint or public).rstrip("/")
        secret = settings.hf_token.get_secret_value() if settings.hf_token else ""
        if secret and self.endpoint != public and not _is_loopback(self.endpoint):
            host = urlsplit(self.endpoint).hostname
            raise UnsafeSourceError(
                f"HF_TOKEN would be sent to {host}, which is not the public Hub; "
                "unset HF_TOKEN to use that endpoint without it, or unset HF_ENDPOINT"
            )
        # False, not None: the client shall not look for a token that somebody left on this machine.
        self.token: str | bool = secret or False

    @contextmanager
    def get(self, pinned: PinnedRef, file: PinnedFile, byte_range: str) -> Iterator[Any]:
        """A streamed response to a request for a file, once its status is good."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(pinned.ref.location, file.path, revision=pinned.revision, endpoint=self.endpoint)
        # Compressed bytes could be neither counted nor continued.
        headers = {"Accept-Encoding": "identity"} | ({"Range": byte_range} if byte_range else {})
        every = build_hf_headers(
            token=self.token, library_name="modelmint", library_version=__version__, headers=headers
        )
        with get_session().stream("GET", url, headers=every, timeout=TIMEOUT_SECONDS) as response:
            hf_raise_for_status(response)
            yield response

    @contextmanager
    def explained(self, ref: ModelRef, path: str = "") -> Iterator[None]:
        """Turn the client's errors into ours; theirs hold addresses that can carry signatures."""
        import httpx2
        from huggingface_hub import errors

        try:
            yield
        except ModelMintError:
            raise
        except errors.OfflineModeIsEnabled as error:
            raise SourceError(f"{ref}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from error
        except errors.HfHubHTTPError as error:
            raise self._refusal(ref, path, error) from error
        except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
            what = f" while reading {path}" if path else ""
            raise NetworkError(
                f"{ref}: no connection to {self.endpoint}{what} ({type(error).__name__}: {error}); "
                "check the network and run again"
            ) from error

    def _refusal(self, ref: ModelRef, path: str, error: Any) -> ModelMintError:
        """What the Hub's refusal means, and the way out."""
        from huggingface_hub import errors

        status = error.response.status_code
        if status in _BUSY:
            return NetworkError(f"{ref}: {self.endpoint} answered {status}{_about(path)}; run again later")
        access = (
            "the account of HF_TOKEN has no access to it"
            if self.token
            else "set HF_TOKEN to a token of an account that has access"
        )
        if isinstance(error, errors.GatedRepoError):
            return SourceError(
                f"{ref} is gated: accept its conditions on {self.endpoint}/{ref.location} first; {access}"
            )
        if isinstance(error, errors.DisabledRepoError):
            return SourceError(f"{ref}: the Hub has disabled this repository; use another one")
        if isinstance(error, errors.RevisionNotFoundError):
            return SourceError(
                f"{ref.location} has no revision {ref.revision!r}; see {self.endpoint}/{ref.location}/tree/main "
                "for its branches and tags, or leave @revision out for the default branch"
            )
        if isinstance(error, errors.EntryNotFoundError):
            return SourceError(f"{ref}: the Hub lists {path} but does not have it; run again")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return SourceError(
                f"{ref}: {self.endpoint} has no such repository, or it is private; check the spelling; "
                f"if it is private: {access}"
            )
        if status == 401:
            return SourceError(f"{ref}: the Hub does not accept HF_TOKEN; make a new token, or unset it")
        return SourceError(f"{ref}: {self.endpoint} refused with {status}{_about(path)}; {access}")


def _about(path: str) -> str:
    return f" for {path}" if path else ""


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
