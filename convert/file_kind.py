"""What a file is, by its first bytes, as a suffix may be wrong."""

import stat
from pathlib import Path
from typing import Literal

from chipmunk_jax.errors import InputError

FileKind = Literal["safetensors", "zip", "pickle", "json"]
HEAD = 512  # bytes that are looked at
HEADER_LENGTH = 100_000_000  # bytes; the longest header of a safetensors file, by its format

# (first bytes, what such a file is, what to do)
REFUSED = (
    (b"GGUF", "a GGUF file, whose quantised weights are not read here", "take the checkpoint as .safetensors"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run `git lfs pull`"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it first"),
    (b"BZh", "compressed by bzip2", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"\x93NUMPY", "a NumPy array", "expected .safetensors or a checkpoint of torch.save"),
    (b"\x89HDF", "an HDF5 file", "expected .safetensors or a checkpoint of torch.save"),
    (b"PYTORCH1", "of a preview of PyTorch 1.0", "save it anew"),
)
BOM = b"\xef\xbb\xbf"  # of a text in UTF-8
HTML = (b"<!doctype", b"<!--", b"<html", b"<?xml", b"<head")


def file_kind(file: Path) -> FileKind:
    """The kind of a file, which is that of its reader.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: no reader reads it, or it is no regular file.
    """
    state = file.stat()
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{file}: neither a file nor a folder with files")
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    kind = readable(head)
    if kind:
        return kind
    what, remedy = refused(head)
    raise InputError(f"{file}: {what}: {remedy}")


def readable(head: bytes) -> FileKind | None:
    """The kind of file that begins with these bytes; None for one that is not read here."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))):
        return "pickle"
    # Eight bytes are the length of the header; those of a text would be a far larger number.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER_LENGTH:
        return "safetensors"
    if head.lstrip()[:1] == b"{" and b"\0" not in head:
        return "json"
    return None


def refused(head: bytes) -> tuple[str, str]:
    """What begins with these bytes and is not read, and what to do."""
    if found := mistaken(head):
        return found
    if head[:64].isascii() and head[:64].decode("ascii").replace("\n", "").replace("\r", "").isprintable():
        return "text", "expected .safetensors or a checkpoint of torch.save; perhaps it is a failed download"
    return "truncated, damaged, or of an unknown kind", "expected .safetensors or a checkpoint of torch.save"


def mistaken(head: bytes) -> tuple[str, str] | None:
    """What begins with these bytes and is no file of a model, and what to do; None where they do not tell."""
    for magic, what, remedy in REFUSED:
        if head.startswith(magic):
            return what, remedy
    if not head:
        return "an empty file", "fetch it again"
    if head.removeprefix(BOM).lstrip().lower().startswith(HTML):
        return "a web page", "the download went wrong, perhaps for want of a login; fetch it again"
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it first, or if PyTorch before 0.2 wrote it, save it anew"
    return None
