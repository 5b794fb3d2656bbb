"""
Readers of text corpora: parquet, JSON lines and plain text, packed or not. Used by data/prepare.py.

    file --read_records--> functions, each gives the field of a record --text_of--> document (str)

Extras: pyarrow for parquet, backports.zstd for .zst before Python 3.14.
"""
import importlib
import json
import lzma
import re
import sys
import zlib
from functools import partial

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
# the package that reads a format or a compression, by the end of the file's name
PACKAGES = {"parquet": "pyarrow.parquet", "gz": "gzip", "xz": "lzma", "zst": ZSTD}
# bytes of the longest JSON line that is read
MAX_LINE = 1 << 26
# rows of parquet that are held at a time
ROWS = 16
# bytes of an .xz file that are unpacked at a time
BLOCK = 1 << 14


def format_of(path):
    """(format, compression or None) by the end of a file's name: ("json", "gz") of x.JSON.gz."""
    return re.search(r"([^.]*)(?:\.(gz|xz|zst))?\Z", path.name.lower()).groups()


def require(package):
    """Import an extra package and return it. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.removesuffix(".parquet")
        raise ValueError(f"the package {name} is missing; pip install {name}") from None


def corruption():
    """The errors that reading on raises where a file is corrupt; others are our bugs."""
    # the last is of a module that may not be loaded
    return (OSError, EOFError, ValueError, NotImplementedError, zlib.error, lzma.LZMAError,
            getattr(sys.modules.get(ZSTD), "ZstdError", OSError))


def read_records(path, raw, field):
    """Yield a function for each record of a file, open for reading as `raw`. What is neither parquet nor JSON
    lines is plain text, one record.

    The function returns the record's field of that name, or its "text", as it is there: str, bytes or a list,
    something else where there is none. It raises ValueError or RecursionError where the record is bad; where
    the file is corrupt, reading on raises one of `corruption`.
    """
    format, packed = format_of(path)
    if format == "parquet":
        yield from (value.as_py for value in _read_column(raw, field))
        return
    if packed == "xz":
        blocks = _unpack_xz(raw)
    else:
        f = require(PACKAGES[packed]).open(raw) if packed else raw
        blocks = iter(partial(f.read1, 1 << 20), b"")
    if format in ("jsonl", "ndjson", "json"):
        yield from (partial(_parse_line, line, field) for line in _lines(blocks) if line.strip())
    else:
        yield partial(b"".join(blocks).decode, "utf-8-sig")


def _lines(blocks):
    """The lines of a file that comes in blocks."""
    rest = b""
    for block in blocks:
        # a line that is too long already needs no more than its end
        if len(rest) <= MAX_LINE or b"\n" in block:
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
    yield rest


def _unpack_xz(raw):
    """Yield what all streams of an .xz file hold; zeros may lie between streams and behind the last.

    lzma.open takes whatever it cannot read after the first stream for the end, damage and zeros alike.
    """
    decoder = lzma.LZMADecompressor()
    for packed in iter(partial(raw.read, BLOCK), b""):
        if decoder.eof:
            packed = packed.lstrip(b"\0")
        while packed:
            if decoder.eof:
                decoder = lzma.LZMADecompressor()
            yield decoder.decompress(packed)
            packed = decoder.unused_data.lstrip(b"\0")
    if not decoder.eof:
        raise EOFError("the file was cut")


def _read_column(f, field):
    file = require(PACKAGES["parquet"]).ParquetFile(f, pre_buffer=False, buffer_size=1 << 20)
    schema = file.schema_arrow
    column = field if field in schema.names else "text"
    if column not in schema.names:
        raise ValueError(f"it has no column {field!r} but {schema.names}; name one of them under 'text' or "
                         f"'chat' in the mix file")
    # each row group alone: where one is corrupt, the rows before it are kept
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(ROWS, [group], [column]):
            yield from batch.column(0)


def _parse_line(line, field):
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} bytes; split it, or make it a .txt file")
    # json.loads alone would let lone surrogates in its bytes pass
    record = json.loads(line.decode("utf-8-sig"))
    # without the field it is the record itself that `text_of` names
    return record.get(field, record.get("text", record)) if isinstance(record, dict) else None


def text_of(value):
    """The document in a record's field: text, its UTF-8 bytes, or messages; it may be empty.

    Raises ValueError where there is no text.
    """
    if isinstance(value, bytes):
        value = value.decode()
    text = render_chat(value) if isinstance(value, list) else value
    if not isinstance(text, str):
        raise ValueError(f"no text in {str(value)[:60]}")
    return text


def render_chat(messages):
    """Render a conversation: "User: ...", "Assistant: ...", "System: ...", an empty line between them.

    messages: a list of {"role", "content"} or {"from", "value"}; human and gpt are User and Assistant. The
    content is text, a list of parts {"text": ...}, or null. Returns None for any other list, and for one
    without text.
    """
    turns = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role = fields.get("role", fields.get("from"))
        if not isinstance(role, str):
            return None
        content = fields.get("content", fields.get("value"))
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        text = "\n".join(text for text in texts if isinstance(text, str)).strip()
        if text:
            role = {"human": "user", "gpt": "assistant"}.get(role, role)
            turns.append(f"{role.capitalize()}: {text}")
    return "\n\n".join(turns) or None
