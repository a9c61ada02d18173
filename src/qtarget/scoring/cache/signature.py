"""A cache from elsewhere: whoever has the key can tell whether it is the one that was signed.

The signature is HMAC-SHA256 over ``manifest.json``, which holds the hash of every shard and of its decoded numbers. The same key
signs and checks, so it protects a cache that travels between machines of one owner, and not against those who hold the key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

from qtarget.core.errors import CacheMismatchError, ConfigError
from qtarget.scoring.cache.schema import MANIFEST
from qtarget.storage.files import read_small, write_json

SIGNATURE = "manifest.sig"
ALGORITHM = "hmac-sha256"
PURPOSE = b"qtarget reference cache, manifest.json\0"
"""Signed before the content: a signature of something else with the same key is none of a cache."""
SHORTEST_KEY = 32


def read_key(path: str | Path) -> bytes:
    """The key in a file, without white space around it.

    Raises:
        ConfigError: the file cannot be read, or holds fewer than 32 bytes.
    """
    try:
        key = read_small(path).strip()
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror or error}") from error
    if len(key) < SHORTEST_KEY:
        raise ConfigError(
            f"the key file {path} holds {len(key)} bytes; expected at least {SHORTEST_KEY} random ones: make one with "
            '`python -c "import secrets; print(secrets.token_hex(32))" > KEYFILE`'
        )
    return key


def sign(directory: str | Path, key: bytes) -> Path:
    """Write the signature of a finished cache beside its manifest.

    Raises:
        CacheMismatchError: there is no manifest.
    """
    path = Path(directory) / SIGNATURE
    write_json(path, {"algorithm": ALGORITHM, "signature": _signature(Path(directory), key)})
    return path


def check_signature(directory: str | Path, key: bytes) -> None:
    """Refuse a cache that is not the one that was signed with this key; its shards' hashes are for the caller to compare.

    Raises:
        CacheMismatchError: no signature, an unreadable one, another key, or another manifest.
    """
    path = Path(directory) / SIGNATURE
    if not path.exists():
        raise CacheMismatchError(
            f"{directory} is not signed (no {SIGNATURE}); expected a signature, for a key is set; get the cache with it from "
            f"whoever made it, or sign it yourself with `qtarget cache sign {directory} --key KEYFILE`"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        algorithm, found = value["algorithm"], bytes.fromhex(value["signature"])
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise CacheMismatchError(f"{path} is unreadable ({error}); get the cache again from whoever made it") from error
    if algorithm != ALGORITHM or not hmac.compare_digest(found, bytes.fromhex(_signature(Path(directory), key))):
        raise CacheMismatchError(
            f"{path} is not the signature of {MANIFEST} with this key: the cache was changed after it was signed, or signed "
            "with another key; use the key that it was signed with, or get the cache again from whoever made it"
        )


def _signature(directory: Path, key: bytes) -> str:
    try:
        content = (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise CacheMismatchError(
            f"{directory} has no readable {MANIFEST} ({error.strerror}); expected a finished cache; run `qtarget score "
            "CONFIG.yaml`"
        ) from error
    return hmac.new(key, PURPOSE + content, hashlib.sha256).hexdigest()
