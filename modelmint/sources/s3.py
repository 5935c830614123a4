"""A prefix of an S3 bucket: ``s3://bucket/prefix``, pinned by the entity tags and versions of its objects."""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from modelmint.artifact import canonical_json, digest_of_bytes
from modelmint.errors import ModelMintError, NetworkError, SourceError
from modelmint.recipe import ModelRef
from modelmint.settings import Settings
from modelmint.sources import PinnedFile, PinnedRef, clean_path
from modelmint.sources.resume import append, resume
from modelmint.sources.selection import needed

MAX_OBJECTS = 10_000
"""A prefix with more of them is no checkpoint, and listing it all would take minutes."""
_CHUNK_BYTES = 1 << 18
_ACCESS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
_REFUSALS = {
    "NoSuchBucket": "there is no such bucket; check its name and AWS_ENDPOINT_URL",
    "NoSuchKey": "there is no such object; check the key",
    "404": "there is no such object; check the bucket and the key",
    "AccessDenied": f"access is denied; {_ACCESS}",
    "403": f"access is denied; {_ACCESS}",
    "InvalidAccessKeyId": f"the access key is not known; {_ACCESS}",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key; {_ACCESS}",
    "ExpiredToken": "the session token has expired; make a new one",
    "InvalidRange": "the object is shorter than it was when it was pinned; run again",
    "PreconditionFailed": "the object has changed since it was pinned; run again when nobody writes to it",
    "412": "the object has changed since it was pinned; run again when nobody writes to it",
}


def resolve(ref: ModelRef, settings: Settings) -> PinnedRef:
    """Pin the objects below a prefix.

    Raises:
        SourceError: if the bucket is missing or closed, or there is no checkpoint below the prefix.
        UnsafeSourceError: if a key would leave the folder it is written into.
        NetworkError: if the server failed for now.
    """
    bucket, prefix = _split(ref.location)
    below = f"{prefix}/" if prefix else ""
    client = _client(settings)
    sizes: dict[str, int] = {}
    with _explained(ref):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=below):
            for item in page.get("Contents", ()):
                # Consoles make empty objects with such names so that folders show.
                if not item["Key"].endswith("/"):
                    sizes[clean_path(item["Key"].removeprefix(below), ref)] = item["Size"]
            if len(sizes) > MAX_OBJECTS:
                raise SourceError(f"{ref} has more than {MAX_OBJECTS} objects; name the prefix of one checkpoint")
    if not sizes:
        raise SourceError(f"{ref} is empty: there is no object below {below!r}; check the prefix")
    wanted = needed(sizes, ref)
    files = tuple(pin_object(client, bucket, below + path, path, ref) for path in wanted)
    listing = [[file.path, file.size, file.etag, file.version] for file in files]
    return PinnedRef(
        ref=ref,
        revision=digest_of_bytes(canonical_json(listing)),
        files=files,
        left_out=tuple(sorted(set(sizes) - set(wanted))),
    )


def pin_object(client: Any, bucket: str, key: str, path: str, source: object) -> PinnedFile:
    """Pin one object, under the path it will have.

    Raises:
        SourceError: if it is missing or closed.
        NetworkError: if the server failed for now.
    """
    with _explained(source, key):
        head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    checksum = head.get("ChecksumSHA256", "")
    # That of an object sent in parts is a digest of digests, and says so by their number.
    whole = bool(checksum) and "-" not in checksum
    return PinnedFile(
        path=path,
        size=head["ContentLength"],
        digest=f"sha256:{base64.b64decode(checksum).hex()}" if whole else None,
        etag=head["ETag"].strip('"'),
        version=head.get("VersionId") or "",
    )


def fetch(
    pinned: PinnedRef, file: PinnedFile, target: Path, settings: Settings, on_bytes: Callable[[int], None]
) -> None:
    """Write the contents of an object, if it still is the one that was pinned."""
    bucket, prefix = _split(pinned.ref.location)
    fetch_object(_client(settings), bucket, f"{prefix}/{file.path}".lstrip("/"), file, target, str(pinned), on_bytes)


def fetch_object(
    client: Any,
    bucket: str,
    key: str,
    file: PinnedFile,
    target: Path,
    source: str,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the contents of a pinned object, continuing what `target` holds already.

    Raises:
        SourceError: if it has changed or cannot be read.
        NetworkError: if connections kept failing; what came is kept.
    """

    def connect(out: BinaryIO) -> None:
        start = out.tell()
        with _explained(source, key):
            answer = client.get_object(
                Bucket=bucket, Key=key, **_exactly(file), **({"Range": f"bytes={start}-"} if start else {})
            )
            append(source, file, answer["Body"].iter_chunks(_CHUNK_BYTES), out, on_bytes)

    resume(source, file, target, on_bytes, connect)


def read_range(pinned: PinnedRef, file: PinnedFile, start: int, length: int, settings: Settings) -> bytes:
    """Read part of an object, if it still is the one that was pinned."""
    wanted = min(length, file.size - start)
    if wanted <= 0:
        return b""
    bucket, prefix = _split(pinned.ref.location)
    key = f"{prefix}/{file.path}".lstrip("/")
    with _explained(pinned, key):
        answer = _client(settings).get_object(
            Bucket=bucket, Key=key, Range=f"bytes={start}-{start + wanted - 1}", **_exactly(file)
        )
        content = answer["Body"].read(wanted)
    if len(content) != wanted:
        raise NetworkError(f"{pinned}: the connection ended inside {file.path}; run again")
    return bytes(content)


def text_object(location: str, settings: Settings) -> tuple[Any, str, str]:
    """The client, bucket and key for an address of one object, ``bucket/key``.

    Raises:
        SourceError: if it names no key.
    """
    bucket, key = _split(location)
    if not key:
        raise SourceError(f"s3://{location} names a bucket, not an object; write s3://bucket/key")
    return _client(settings), bucket, key


def _exactly(file: PinnedFile) -> dict[str, str]:
    return {"IfMatch": f'"{file.etag}"'} | ({"VersionId": file.version} if file.version else {})


def _split(location: str) -> tuple[str, str]:
    bucket, _, prefix = location.partition("/")
    return bucket, prefix.strip("/")


def _client(settings: Settings) -> Any:
    import boto3
    from botocore.config import Config

    endpoint = settings.s3_endpoint
    # A session of its own: the shared one is not made for threads, and keeps the credentials it saw first.
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        config=Config(
            connect_timeout=10,
            read_timeout=60,
            retries={"mode": "standard", "max_attempts": 4},
            # Other servers than Amazon's seldom have a name for each bucket.
            s3={"addressing_style": "path" if endpoint else "auto"},
        ),
    )


@contextmanager
def _explained(source: object, key: str = "") -> Iterator[None]:
    """Turn the client's errors into ours."""
    from botocore import exceptions

    about = f"{source}" + (f", {key}" if key else "")
    try:
        yield
    except ModelMintError:
        raise
    except exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status >= 500 or code in ("SlowDown", "RequestTimeout", "ServiceUnavailable", "TooManyRequests"):
            raise NetworkError(f"{about}: the server answered {status} {code}; run again later") from error
        meaning = _REFUSALS.get(code, f"the server refused with {status} {code}")
        raise SourceError(f"{about}: {meaning}") from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise SourceError(
            f"{about}: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except (
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.ConnectionError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise NetworkError(
            f"{about}: {type(error).__name__}; check the network and AWS_ENDPOINT_URL, run again"
        ) from error
    except exceptions.ParamValidationError as error:
        raise SourceError(f"{about}: not an address that S3 knows ({error})") from error
