"""
The hub's HTTP interface: lists of a dataset repository's files, and files, fetched whole or not at all. Used
by data/prepare.py.

Every request is tried again with backoff where that can help, a body goes on by Range where it
stopped, and a file gets its name when its size and, where the hub gives one, its sha256 are right.

Environment: HF_ENDPOINT (default https://huggingface.co), HF_TOKEN (sent to that host alone).
"""
import fnmatch
import os
import re
import sys
import time
from math import inf
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests

from common import Progress, sha256_of

# failures in a row, without a byte gained between them, before a file is given up
RETRIES = 8
# seconds after which a hub that never answered is given up: there is no network
OFFLINE = 20.0
# seconds before the first retry, doubling up to a minute
BACKOFF = 1.0
# seconds for a connection, and of silence that end one
TIMEOUT = (10.0, 30.0)
# what is raised by a bad URL, and by an answer that is not of the hub's kind
FOREIGN = (ValueError, LookupError, TypeError)


def warn(message):
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


progress = Progress()


class Hub:
    """A session with the hub. Methods raise ValueError, see `retry`."""

    def __init__(self):
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        # without the line ends that come with copying: requests would print a token that holds one
        self.token = re.sub(r"[^!-~]", "", os.environ.get("HF_TOKEN", ""))
        # when a hub that has not answered is given up
        self.deadline = time.monotonic() + OFFLINE
        self.session = requests.Session()
        self.session.headers["Accept-Encoding"] = "identity"
        if self.token:
            # dropped when a redirect leads to another host or port
            self.session.headers["Authorization"] = f"Bearer {self.token}"
            # not what a .netrc says
            self.session.auth = lambda request: request

    def _get(self, url, headers={}):
        response = self.session.get(url, stream=True, timeout=TIMEOUT, headers=headers)
        self.deadline = inf
        response.raise_for_status()
        return response

    def retry(self, what, attempt, gained=lambda: 0):
        """Call `attempt` until it returns.

        Raises ValueError where that is hopeless: on most of HTTP 400 to 499, on a bad URL or an answer of
        another kind than the hub's, OFFLINE seconds after the start where the hub never answered, and after
        RETRIES failures in a row between which `gained()`, bytes, did not grow.
        """
        failures = 0
        while True:
            before = gained()
            try:
                return attempt()
            except (requests.RequestException, *FOREIGN) as e:
                error = e
            failures = 1 if gained() > before else failures + 1
            answer = getattr(error, "response", None)
            status = getattr(answer, "status_code", 0)
            message = f"{what}: {type(error).__name__} at byte {gained():,}: {str(error)[-160:]}"
            refused = 400 <= status < 500 and status not in (408, 429) or isinstance(error, FOREIGN)
            if refused or failures > RETRIES or time.monotonic() > self.deadline:
                raise ValueError(f"{message}; given up after {failures} failures: run the command again to "
                                 f"go on from here; if nothing answers, or not the hub, look at the network "
                                 f"and HF_ENDPOINT; if it is refused or not found, accept its terms on its "
                                 f"page and set HF_TOKEN, or correct the mix file")
            # Retry-After in seconds; a date is rare, and left to the backoff
            asked = answer.headers.get("Retry-After", "") if status else ""
            wait = min(3600, int(asked)) if asked.isdigit() else min(60, BACKOFF * 2 ** (failures - 1))
            warn(f"{message}; attempt {failures + 1} in {wait:.1f} s")
            time.sleep(wait)

    def list(self, source, pattern):
        """Yield (path, bytes, sha256 or None) of a source's files that match a pattern, as listed now."""
        # the folders of the pattern before its first wildcard
        folder = re.match(r"[^*?\[]*(?=/)", f"/{pattern}")[0]
        revision = quote(source.get("revision", "main"), safe="")
        url = f"{self.endpoint}/api/datasets/{source['repository']}/tree/{revision}{quote(folder)}"
        query = "recursive=true"

        def page():
            with self._get(f"{url}?{query}") as response:
                # large files have a sha256
                files = [(entry["path"], entry["size"], (entry.get("lfs") or {}).get("oid"))
                         for entry in response.json() if entry["type"] == "file"]
                return files, response.links.get("next", {}).get("url", "")

        while query:
            files, following = self.retry(f"{source['repository']}{folder}", page)
            for file in files:
                # none that would be written outside the folder of its source
                if fnmatch.fnmatchcase(file[0], pattern) and not re.search(r"(^|/)(\.\.)?(/|$)", file[0]):
                    yield file
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
            if begin >= size:
                return
            with self._get(url, {"Range": f"bytes={begin}-"}) as response, open(partial, "ab") as f:
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

        self.retry(what, attempt, gained=have)
        if have() != size or sha256 and sha256_of(partial) != sha256:
            # whatever it is, it is not the beginning of the file
            partial.unlink()
            raise ValueError(f"{what} has not the size or the sha256 that the hub lists; it was deleted, run "
                             f"the command again to fetch it anew")
        partial.replace(target)
