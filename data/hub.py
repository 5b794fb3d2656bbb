"""
The hub's HTTP interface: lists of a dataset repository's files, and files, fetched whole or not at all. Used
by data/prepare.py.

Every request is tried again with backoff and jitter where that can help, a body goes on by Range where it
stopped, and a file gets its name when its size and, where the hub gives one, its sha256 are right.

Environment: HF_ENDPOINT (default https://huggingface.co), HF_TOKEN (sent to that host alone).
"""
import fnmatch
import os
import random
import re
import sys
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests

from common import sha256_of

# failures in a row, without a byte gained between them, before a file is given up
RETRIES = 8
# seconds before the first retry, doubling up to a minute
BACKOFF = 1.0
# seconds of silence that end a connection
TIMEOUT = 30.0


def warn(message):
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


_shown = time.monotonic()


def progress(label, done, total):
    """Say on stderr how many bytes are done; but once in ten seconds."""
    global _shown
    if time.monotonic() > _shown + 10:
        _shown = time.monotonic()
        print(f"{label} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)


def retry(what, attempt, gained=lambda: 0):
    """Call `attempt` until it returns.

    Raises ValueError where that is hopeless: on most of HTTP 400 to 499, on a bad URL or answer, and after
    RETRIES failures in a row between which `gained()`, bytes, did not grow.
    """
    failures = 0
    while True:
        before = gained()
        try:
            return attempt()
        except requests.RequestException as e:
            error = e
        failures = 1 if gained() > before else failures + 1
        answer = error.response
        status = 0 if answer is None else answer.status_code
        # a ValueError is of our URL, or of an answer that is no JSON
        hopeless = isinstance(error, ValueError) or 400 <= status < 500 and status not in (408, 429)
        message = f"{what}: {type(error).__name__} at byte {gained():,}: {str(error)[-160:]}"
        if hopeless or failures > RETRIES:
            raise ValueError(f"{message}; given up after {failures} failures: run the command again to go on "
                             f"from here; if it is refused or not found, accept its terms on its page and "
                             f"set HF_TOKEN, or correct HF_ENDPOINT or the mix file")
        # Retry-After in seconds; a date is rare, and left to the backoff
        asked = answer.headers.get("Retry-After", "") if status else ""
        wait = min(60, BACKOFF * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
        if asked.isdigit():
            wait = min(3600, int(asked))
        warn(f"{message}; attempt {failures + 1} in {wait:.1f} s")
        time.sleep(wait)


class Hub:
    """A session with the hub. Methods raise ValueError, see `retry`."""

    def __init__(self):
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        # without the line ends that come with copying: requests would print a token that holds one
        self.token = re.sub(r"[^!-~]", "", os.environ.get("HF_TOKEN", ""))
        self.session = requests.Session()
        self.session.auth = self._authorise
        self.session.headers["Accept-Encoding"] = "identity"

    def _authorise(self, request):
        """Add the token to a request; requests drops it when a redirect leads to another host or port."""
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def _get(self, url, headers={}):
        response = self.session.get(url, stream=True, timeout=TIMEOUT, headers=headers)
        response.raise_for_status()
        return response

    def list(self, source, pattern):
        """Yield (path, bytes, sha256 or None) of a source's files that match a pattern, as listed now."""
        # the folders of the pattern before its first wildcard
        folder = re.match(r"([^*?\[/]+/)*", pattern)[0]
        revision = quote(source.get("revision", "main"), safe="")
        what = f"{source['repository']}/{folder}"
        url = f"{self.endpoint}/api/datasets/{source['repository']}/tree/{revision}/{quote(folder)}"
        query = "recursive=true"

        def page():
            with self._get(f"{url.rstrip('/')}?{query}") as response:
                return response.json(), response.links.get("next", {}).get("url", "")

        while query:
            entries, following = retry(what, page)
            for entry in entries:
                path = entry.get("path", "/") if isinstance(entry, dict) else "/"
                if path.startswith("/") or ".." in path.split("/"):
                    raise ValueError(f"{what}: {self.endpoint} does not list files below this folder but "
                                     f"{entry!r}; look at HF_ENDPOINT, or do not use this repository")
                if entry["type"] == "file" and fnmatch.fnmatchcase(path, pattern):
                    # large files have a sha256
                    yield path, entry["size"], (entry.get("lfs") or {}).get("oid")
            # never to another host, whatever the link says
            query = urlsplit(following).query

    def fetch(self, source, path, size, sha256, target):
        """Download one file to `target`: resumed from `target`.part, verified, then renamed."""
        what = f"{source['repository']}/{path}"
        revision = quote(source.get("revision", "main"), safe="")
        url = f"{self.endpoint}/datasets/{source['repository']}/resolve/{revision}/{quote(path)}"
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{target}.part")
        partial.touch()

        def have():
            return partial.stat().st_size

        def attempt():
            begin = have()
            if begin >= size > 0:
                return
            headers = {"Range": f"bytes={begin}-"} if begin else {}
            with self._get(url, headers) as response, open(partial, "ab") as f:
                # a server without Range sends the file from its start
                if response.status_code == 200:
                    f.truncate(0)
                for chunk in response.iter_content(1 << 15):
                    f.write(chunk)
                    progress(what, f.tell(), size)
                f.flush()
                # on the disk before it gets its name
                os.fsync(f.fileno())
            if have() < size:
                raise requests.ConnectionError("the body ended early")

        retry(what, attempt, gained=have)
        if have() != size or sha256 and sha256_of(partial) != sha256:
            # whatever it is, it is not the beginning of the file
            partial.unlink()
            raise ValueError(f"{what} has not the size or the sha256 that the hub lists; it was deleted, run "
                             f"the command again to fetch it anew")
        partial.replace(target)
