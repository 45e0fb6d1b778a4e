"""The orientation in EXIF data, which Pillow can only change by writing all other tags anew, as far as it can."""

import struct

ORIENTATION = 0x0112
PREFIX = b"Exif\0\0"  # as JPEG has it


def orientation(exif: bytes) -> int:
    """1 to 8, and 1 if nothing is said.

    Raises:
        ValueError: the data cannot be read.
    """
    place = _place(exif)
    return 1 if place is None else struct.unpack_from(place[0] + "H", exif, place[1])[0]


def upright(exif: bytes) -> bytes:
    """The same data, every other byte of it, for a picture that has been turned upright."""
    place = _place(exif)
    if place is None:
        return exif
    order, offset = place
    return exif[:offset] + struct.pack(order + "H", 1) + exif[offset + 2 :]


def _place(exif: bytes) -> tuple[str, int] | None:
    """Byte order and offset of the orientation in the first directory."""
    start = len(PREFIX) if exif.startswith(PREFIX) else 0
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[start : start + 4])
    if order is None:
        raise ValueError("no EXIF data")
    try:
        directory = start + struct.unpack_from(order + "I", exif, start + 4)[0]
        (count,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, length, _ = struct.unpack_from(order + "HHII", exif, entry)
            if (tag, kind, length) == (ORIENTATION, 3, 1):
                return order, entry + 8
    except struct.error as error:
        raise ValueError("EXIF data that ends early") from error
    return None
