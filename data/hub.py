"""
The hub's HTTP interface: lists of a dataset repository's files, and files, fetched whole or not at all. Used by data/prepare.py.

Every request is tried again with backoff and jitter where that can help, a body goes on by Range where it stopped, and a file gets its
name when its size and, where the hub gives one, its sha256 are right.

Environment: HF_ENDPOINT (default https://huggingface.co), HF_TOKEN (sent to that host alone).
"""
import fnmatch
import hashlib
import itertools
import os
import random
import re
import sys
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests

RETRIES = 8                         # failures in a row without a byte gained before a file is given up
BACKOFF, TIMEOUT = 1.0, 30.0        # seconds before the first retry, doubling up to a minute; seconds of silence that end a connection


def warn(message):
    print(f"{Path(sys.argv[0]).name}: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def progress(label, total, begun=0):
    """Return a function to call often: it prints a line with rate and ETA on standard error every ten seconds.

    total, begun (what was there before), and what the argument of that function, `tell`, returns: bytes."""
    start = last = time.monotonic()

    def show(tell):
        nonlocal last
        now = time.monotonic()
        if now - last > 10 and (done := tell()) > begun:
            last, rate = now, (done - begun) / 1e6 / (now - start)
            print(f"{label} {done / 1e6:,.0f}/{total / 1e6:,.0f} MB {rate:.1f} MB/s eta:{(total - done) / 6e7 / rate:.1f}m",
                  file=sys.stderr, flush=True)
    return show


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def retry(what, attempt, gained=lambda: 0):
    """Call `attempt` until it returns. Raises ValueError where that is hopeless: on most of HTTP 400 to 499, and after RETRIES failures
    in a row between which `gained()`, bytes, did not grow."""
    failures = 0
    while True:
        before = gained()
        try:
            return attempt()
        except requests.RequestException as error:
            message, answer = f"{what}: {type(error).__name__} at byte {gained():,}: {str(error)[-160:]}", error.response
        status = 0 if answer is None else answer.status_code
        if 400 <= status < 500 and status not in (408, 425, 429):
            raise ValueError(f"{message}; look at its page: accept its terms and set HF_TOKEN to a token that may read it, or correct the mix file")
        failures = 1 if gained() > before else failures + 1
        if failures > RETRIES:
            raise ValueError(f"{message}; given up after {failures} attempts, run the command again to go on from here")
        asked = answer.headers.get("Retry-After", "") if status else ""     # seconds; a date is rare, and left to the backoff
        wait = min(3600, int(asked)) if asked.isdigit() else min(60, BACKOFF * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
        warn(f"{message}; attempt {failures + 1} in {wait:.1f} s")
        time.sleep(wait)


class Hub:
    """The hub's HTTP interface: lists of files, and files."""

    def __init__(self):
        self.endpoint, self.token = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"), os.environ.get("HF_TOKEN", "").strip()
        if not re.fullmatch(r"https?://[^/\s]+\S*", self.endpoint):
            raise ValueError(f"HF_ENDPOINT must be a URL like https://huggingface.co, not {self.endpoint!r}")
        if not re.fullmatch(r"[!-~]*", self.token):                         # requests would print it in its error
            raise ValueError("HF_TOKEN holds characters that no token has; copy it again")
        self.session = requests.Session()
        self.session.auth = self._authorise

    def _authorise(self, request):
        """Add the token to a request; requests drops it when a redirect leads to another host or port."""
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def get(self, url, headers={}):
        """GET a URL of the endpoint. Raises requests.HTTPError on any status but success."""
        response = self.session.get(url, stream=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"} | headers)
        response.raise_for_status()
        return response

    def list(self, source, pattern):
        """Yield (path, bytes, sha256 or None) of the files of a source that match a pattern, as the hub lists them now."""
        folder = "/".join(itertools.takewhile(lambda part: not set(part) & set("*?["), pattern.split("/")[:-1]))
        revision, what, query = quote(source.get("revision", "main"), safe=""), f"{source['repository']}/{folder}", "recursive=true"
        url = f"{self.endpoint}/api/datasets/{source['repository']}/tree/{revision}/{quote(folder)}".rstrip("/")

        def page():
            with self.get(f"{url}?{query}") as response:
                return response.json(), response.links.get("next", {}).get("url", "")
        while query:
            entries, following = retry(what, page)
            try:
                files = [(e["path"], e.get("lfs") or {"size": e["size"]}) for e in entries if e["type"] == "file"]  # large ones have a sha256
                files = [(path, int(large["size"]), large.get("oid")) for path, large in files if fnmatch.fnmatchcase(path, pattern)]
            except (KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{what}: {self.endpoint} answers with something else than a list of files ({e!r}); look at HF_ENDPOINT") from None
            for path, size, sha256 in files:
                if ".." in path.split("/") or path.startswith("/"):
                    raise ValueError(f"{what}: the hub lists the unsafe path {path!r}; do not use this repository")
                yield path, size, sha256
            query = urlsplit(following).query                               # never to another host, whatever the link says

    def fetch(self, source, path, size, sha256, target):
        """Download one file to `target`: resumed from `target`.part, verified, then renamed."""
        what, part, revision = f"{source['repository']}/{path}", Path(f"{target}.part"), quote(source.get("revision", "main"), safe="")
        url = f"{self.endpoint}/datasets/{source['repository']}/resolve/{revision}/{quote(path)}"
        target.parent.mkdir(parents=True, exist_ok=True)

        def have():
            return part.stat().st_size if part.exists() else 0
        show = progress(f"source:{source['name']} {path}", size, begun=have())

        def attempt():
            begin = have()
            if begin >= size > 0:
                return
            with self.get(url, {"Range": f"bytes={begin}-"} if begin else {}) as response, open(part, "ab") as f:
                if response.status_code == 200:                             # a server without Range: from the start
                    f.seek(f.truncate(0))
                elif not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                    raise requests.ConnectionError("the server sent another range than asked for")
                for chunk in response.iter_content(1 << 15):
                    f.write(chunk)
                    show(f.tell)
                f.flush()
                os.fsync(f.fileno())                                        # on the disk before it gets its name
            if have() < size:
                raise requests.ConnectionError("the body ended early")
        retry(what, attempt, gained=have)
        digest = sha256_of(part) if sha256 else None
        if have() != size or digest != sha256:
            message = f"{have():,} bytes and sha256 {digest}, where the hub lists {size:,} and {sha256}"
            part.unlink()                                                   # whatever it is, it is not a beginning of the file
            raise ValueError(f"{what}: {message}; it was deleted, run the command again to fetch it anew")
        part.replace(target)
