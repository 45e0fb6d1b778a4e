"""TIFF files, in which every number may have any size, type and order; docs/pictures.md has the table.

Compressed bytes are undone by zlib and libtiff (through Pillow); what they mean is decided here.
"""

import struct
import zlib
from dataclasses import replace
from io import BytesIO
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffbir.utils.raster import Raster, Unsupported, scaled, white

MAGIC = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"  # the last two are BigTIFF

GREY_INVERTED, GREY, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COLOURS = {GREY_INVERTED: 1, GREY: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
OTHERS = {
    4: "a mask",
    8: "in CIELAB",
    9: "in ICCLAB",
    10: "in ITULAB",
    32803: "a raw photo (colour filter array)",
    32844: "in LogL",
    32845: "in LogLuv",
    34892: "a raw photo (linear)",
    51177: "a depth map",
}
NONE, LZW, OLD_JPEG, JPEG, DEFLATE, PACKBITS, OLD_DEFLATE, LZMA, ZSTD = 1, 5, 6, 7, 8, 32773, 32946, 34925, 50000
BYTEWISE = NONE, LZW, DEFLATE, PACKBITS, OLD_DEFLATE, LZMA, ZSTD  # give bytes, whatever they mean
FAX = 2, 3, 4
TYPES = {  # SampleFormat -> type, bits
    1: ("u", (8, 16, 32, 64)),
    2: ("i", (8, 16, 32, 64)),
    3: ("f", (16, 32, 64)),
    4: ("u", (8, 16, 32)),  # "undefined"
}
UNSPECIFIED, ASSOCIATED = 0, 1  # ExtraSamples
FORMATS = dict(zip((1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 16, 17, 18), "BsHIbshifdIQqQ", strict=True))  # types of tags
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


PROFILE = 34675
USED = {
    256,
    257,
    258,
    259,
    262,
    266,
    273,
    274,
    277,
    278,
    279,
    284,
    317,
    322,
    323,
    324,
    325,
    332,
    338,
    339,
    340,
    341,
    PROFILE,
}
MOST_TAGS = 4096
Tags = dict[int, tuple | bytes]


def read(stream: BinaryIO, pixel_limit: int) -> tuple[Raster, int] | None:
    """The first picture of a TIFF file, and its orientation (EXIF), in which it is not yet.

    Returns:
        None where Pillow reads it right: palettes, less than 8 bits, JPEG and fax compression.

    Raises:
        Unsupported: a layout, type or colour space that isn't read, by name.
        Image.DecompressionBombError: more pixels than the limit.
        Exception: the file is damaged; of any type.
    """
    tags, order, more = _directory(stream)
    width, height = tags[256][0], tags[257][0]
    if width * height > pixel_limit:
        raise Image.DecompressionBombError(f"{width * height} pixels")
    if min(width, height) < 1:
        raise ValueError(f"it is {width} x {height}")
    photometric = _one(tags, 262, "colour spaces", GREY_INVERTED)
    channels = _one(tags, 277, "numbers of channels", 1)
    bits = _one(tags, 258, "bits", 1)
    kind = _one(tags, 339, "types of samples", 1)
    compression = _one(tags, 259, "compressions", NONE)
    if photometric not in COLOURS:
        raise Unsupported(f"is a TIFF {OTHERS.get(photometric, f'of colour space {photometric}')}; save it as RGB")
    extra = channels - COLOURS[photometric]
    if not 0 <= extra <= 1:
        raise Unsupported(
            f"is a TIFF of {channels} channels; save it as grey, RGB or CMYK with at most one more for alpha"
        )
    if photometric == CMYK and tags.get(332, (1,)) != (1,):
        raise Unsupported("is a TIFF of other inks than CMYK; save it as RGB")
    separate = channels > 1 and tags.get(284) == (2,)
    if kind in (1, 4) and not extra and not separate:
        small = bits in (1, 2, 4) or (bits == 8 and photometric == PALETTE)
        plain = photometric in (GREY, GREY_INVERTED, PALETTE) and compression in (*BYTEWISE, *FAX)
        jpeg = photometric in (GREY, RGB, YCBCR) and compression in (OLD_JPEG, JPEG)
        if (small and plain) or (bits == 8 and jpeg):
            return None
    if kind not in TYPES or bits not in TYPES[kind][1]:
        raise Unsupported(f"is a TIFF of {bits} bits with samples of type {kind}; save it with 8 or 16 bits")
    if photometric in (PALETTE, YCBCR) or compression not in BYTEWISE:
        raise Unsupported(
            f"is a TIFF whose colour space {photometric}, {channels} channels of {bits} bits and compression "
            f"{compression} are not read together; save it as RGB with LZW"
        )
    dtype = np.dtype(f"{order}{TYPES[kind][0]}{bits // 8}")
    samples = _samples(stream, tags, (height, width, channels), dtype, compression, separate)
    raster = _raster(samples, tags, photometric)
    notes = ("only the first picture of several is read",) if more else ()
    return replace(raster, notes=raster.notes + notes), _one(tags, 274, "orientations", 1)


def _directory(stream: BinaryIO) -> tuple[Tags, str, bool]:
    """Numbers as tuples, all else as bytes; the byte order; whether another picture follows."""
    head = stream.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = 43 in head[2:4]
    number, entry, offset = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    number, entry, offset = (struct.Struct(order + x) for x in (number, entry, offset))
    stream.seek(offset.unpack_from(head, 8 if big else 4)[0])
    (count,) = number.unpack(stream.read(number.size))
    if count > MOST_TAGS:
        raise ValueError(f"it claims {count} tags")
    entries = stream.read(count * entry.size)
    following = stream.read(offset.size)
    tags = {}
    for tag, kind, length, value in entry.iter_unpack(entries):
        if tag not in USED or kind not in FORMATS:
            continue
        size = length * struct.calcsize("=" + FORMATS[kind])
        if size > len(value):
            stream.seek(offset.unpack(value)[0])
            value = stream.read(size)
        if len(value) < size:
            raise ValueError(f"tag {tag} lies outside of the file")
        text = FORMATS[kind] == "s" or tag == PROFILE
        tags[tag] = value[:size] if text else struct.unpack(f"{order}{length}{FORMATS[kind]}", value[:size])
    return tags, order, len(following) == offset.size and offset.unpack(following) != (0,)


def _one(tags: Tags, tag: int, what: str, default: int) -> int:
    """The value that all channels share."""
    values = set(tags.get(tag, (default,)))
    if len(values) != 1:
        raise Unsupported(f"is a TIFF with {what} {sorted(values)}; save it as RGB with 8 or 16 bits")
    return values.pop()


def _samples(
    stream: BinaryIO, tags: Tags, shape: tuple[int, int, int], dtype: np.dtype, compression: int, separate: bool
) -> NDArray:
    """(H, W, C) of all strips or tiles."""
    height, width, channels = shape
    planes, depth = (channels, 1) if separate else (1, channels)
    if tiled := 324 in tags:
        (columns,), (rows,), offsets, counts = (tags[tag] for tag in (322, 323, 324, 325))
    else:
        columns, rows = width, min(tags.get(278, (height,))[0], height)
        offsets, counts = tags[273], tags.get(279)
    if min(columns, rows) < 1 or columns * rows > max(4 * width * height, 2**24):
        raise ValueError(f"its tiles are {columns} x {rows}")
    corners = [(p, y, x) for p in range(planes) for y in range(0, height, rows) for x in range(0, width, columns)]
    if min(len(offsets), len(counts or offsets)) < len(corners):
        raise ValueError(f"it has {len(offsets)} of {len(corners)} strips or tiles")
    predictor = tags.get(317, (1,))[0] if compression != NONE else 1
    out = np.empty((planes, height, width, depth), dtype.newbyteorder("="))
    for i, (p, y, x) in enumerate(corners):
        lines = rows if tiled else min(rows, height - y)
        size = lines * columns * depth * dtype.itemsize
        stream.seek(offsets[i])
        data = stream.read(counts[i] if counts and compression != NONE else size)
        if tags.get(266) == (2,):
            data = data.translate(REVERSED)
        data = _decompressed(data, compression, lines, size)
        if len(data) < size:
            raise ValueError(f"{len(data)} of {size} bytes are there")
        block = _predicted(np.frombuffer(data, np.uint8, size).reshape(lines, -1), dtype, depth, predictor)
        out[p, y : y + lines, x : x + columns] = block[: height - y, : width - x]
    return out[0] if planes == 1 else np.ascontiguousarray(out[..., 0].transpose(1, 2, 0))


def _decompressed(data: bytes, compression: int, lines: int, size: int) -> bytes:
    if compression == NONE:
        return data
    if compression in (DEFLATE, OLD_DEFLATE):
        return zlib.decompressobj().decompress(data, size)
    # A grey picture of bytes, as which libtiff leaves them as they are.
    entries = {
        256: size // lines, 257: lines, 258: 8, 259: compression, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: lines,
        279: len(data),
    }  # fmt: skip
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    with Image.open(BytesIO(head + body + bytes(4) + data), formats=["TIFF"]) as image:
        return image.tobytes()


def _predicted(lines: NDArray[np.uint8], dtype: np.dtype, depth: int, predictor: int) -> NDArray:
    """Bytes of lines -> (H, W, C) samples; undoes differences of neighbours (TIFF 6.0, technical note 3)."""
    if predictor == 1:
        return lines.view(dtype).reshape(len(lines), -1, depth)
    if predictor == 2:
        unsigned = np.dtype(f"u{dtype.itemsize}")
        steps = lines.view(unsigned.newbyteorder(dtype.byteorder)).reshape(len(lines), -1, depth)
        return np.cumsum(steps, axis=1, dtype=unsigned).view(dtype.newbyteorder("="))
    if predictor == 3 and dtype.kind == "f":
        planes = np.cumsum(lines.reshape(len(lines), -1, depth), axis=1, dtype=np.uint8)
        planes = planes.reshape(len(lines), dtype.itemsize, -1)  # the highest bytes of all samples first
        samples = np.ascontiguousarray(planes.swapaxes(1, 2)).view(dtype.newbyteorder(">"))
        return samples.reshape(len(lines), -1, depth)
    raise Unsupported(f"is a TIFF with predictor {predictor}; save it without one")


def _raster(samples: NDArray, tags: Tags, photometric: int) -> Raster:
    """What the samples mean."""
    low, high = tags.get(340), tags.get(341)
    declared = (float(min(low)), float(max(high))) if low and high and min(low) < max(high) else None
    channels = COLOURS[photometric]
    colour, notes = scaled(samples[..., :channels], declared)
    alpha = None
    if samples.shape[2] > channels:
        meaning = tags.get(338, (None,))[0]
        if meaning == UNSPECIFIED:
            notes.append("a channel that isn't declared as alpha is left out")
        else:
            alpha = scaled(samples[..., channels], declared)[0]
        if meaning == ASSOCIATED:
            if photometric in (GREY_INVERTED, CMYK):
                raise Unsupported("is a TIFF whose inks are multiplied by its alpha; save it as RGB")
            colour = _divided(colour, alpha)
    if photometric == GREY_INVERTED:
        colour = (white(colour.dtype) - colour).astype(colour.dtype)
    return Raster(colour, alpha, tags.get(PROFILE), notes=tuple(notes))


def _divided(colour: NDArray, alpha: NDArray) -> NDArray:
    """Colours that were multiplied by alpha, without it."""
    top = white(colour.dtype)
    x = colour.astype(np.float64) * top / np.where(alpha > 0, alpha, np.inf)[..., None]
    return (x if colour.dtype.kind == "f" else np.rint(x)).clip(0, top).astype(colour.dtype)
