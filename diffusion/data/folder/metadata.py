"""Pictures with metadata that Pillow cannot parse: they are decoded without it, because only the orientation is needed.

PNG specification, 5.3; ITU-T T.81, B.1.1 (JPEG); TIFF 6.0, section 2.
"""

import struct
import zlib
from collections.abc import Callable
from typing import TypeVar

from PIL import ExifTags, Image

Result = TypeVar("Result")

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
# Optional chunks of PNG that are needed, and texts that may hold the orientation.
PNG_NEEDED = b"tRNS", b"eXIf", b"fdAT"
PNG_ANIMATION = {b"acTL": 8, b"fcTL": 26}  # needed, too, if they have this number of bytes
PNG_TEXTS = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"
# Markers of JPEG: of segments before the pixels, of segments of applications, and of a comment.
SEGMENTS, APP, COM = {*range(0xC0, 0xD0), *range(0xDB, 0xFF)}, range(0xE0, 0xF0), 0xFE
# Segments of applications that are needed. JFIF and Adobe decide how colours are stored; libjpeg ignores shorter ones.
JFIF, ADOBE, XMP, EXIF = b"JFIF\0", b"Adobe", b"http://ns.adobe.com/xap/1.0/\0", b"Exif\0\0"
JPEG_NEEDED = {JFIF: 14, ADOBE: 12, XMP: len(XMP)}  # the least number of bytes
# The order of bytes, and the types of a number of entries and of a place in the file. The last is BigTIFF, which Pillow
# reads in this order only.
TIFF = {b"II*\0": "<HI", b"MM\0*": ">HI", b"II+\0": "<QQ"}
TIFF_DIRECTORIES = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop
TIFF_XMP, TIFF_TYPES_OF_XMP = 0x02BC, (1, 7)


def tolerated(decode: Callable[[bytes], Result], data: bytes) -> Result:
    """decode(data). If that fails, the result for the same file without metadata that is not needed.

    Raises:
        Exception: that of decode(data), if both fail or if the metadata exceeds our limits.
    """
    try:
        return decode(data)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises different types for garbage
        if "MAX_TEXT" in str(error):
            raise
        try:
            return decode(without_metadata(data))
        except MemoryError:
            raise
        except Exception:
            raise error from None


def without_metadata(data: bytes) -> bytes:
    """A PNG, JPEG or TIFF file with the same pixels and orientation; any other file as it is.

    Raises:
        IndexError or struct.error: it is cut off before its pixels.
    """
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(JPEG):
        return _jpeg(data)
    return _tiff(data) if data[:4] in TIFF else data


def _png(data: bytes) -> bytes:
    """The chunks that are needed. From the first damaged one on, all are kept."""
    begin, kept = len(PNG), [PNG]
    while begin < len(data):
        length, kind = int.from_bytes(data[begin : begin + 4]), data[begin + 4 : begin + 8]
        end = begin + 12 + length  # the length, the kind and a checksum
        content, checksum = data[begin + 8 : end - 4], data[end - 4 : end]
        if zlib.crc32(kind + content) != int.from_bytes(checksum):  # damage, perhaps of the length
            break
        is_animation = PNG_ANIMATION.get(kind) == length
        if kind[:1].isupper() or kind in PNG_NEEDED or is_animation or content.startswith(PNG_TEXTS):
            kept.append(data[begin:end])
        begin = end
    return b"".join(kept) + data[begin:]


def _jpeg(data: bytes) -> bytes:
    """The segments that are needed. Of EXIF it is only the orientation; from the pixels on, all is kept."""
    begin, kept, exif = len(JPEG), [], []
    while data[begin : begin + 1] == b"\xff" and (marker := data[begin + 1]) in SEGMENTS:
        end = begin + 2 + int.from_bytes(data[begin + 2 : begin + 4])
        content = data[begin + 4 : end]
        if marker in APP and content.startswith(EXIF):
            exif.append(content.removeprefix(EXIF))
        elif marker not in (*APP, COM) or _is_needed(content):
            kept.append(data[begin:end])
        begin = end
    return JPEG + _orientation_segment(b"".join(exif)) + b"".join(kept) + data[begin:]


def _is_needed(content: bytes) -> bool:
    return any(content.startswith(start) and len(content) >= least for start, least in JPEG_NEEDED.items())


def _orientation_segment(exif: bytes) -> bytes:
    """An EXIF segment with the orientation of a block and nothing else; b"" if it has none or is damaged."""
    given, alone = Image.Exif(), Image.Exif()
    try:
        given.load(exif)
        alone[ExifTags.Base.Orientation] = given[ExifTags.Base.Orientation]
        content = alone.tobytes()
    except MemoryError:
        raise
    except Exception:
        return b""
    return b"\xff" + bytes([APP[1]]) + struct.pack(">H", len(content) + 2) + content


def _tiff(data: bytes) -> bytes:
    """The file without the entries of its first directory that Pillow follows to EXIF and GPS, and damaged XMP."""
    order, number_type, place_type = TIFF[data[:4]]
    number_bytes, place_bytes = struct.calcsize(order + number_type), struct.calcsize(order + place_type)
    (begin,) = struct.unpack_from(order + place_type, data, place_bytes)
    (number,) = struct.unpack_from(order + number_type, data, begin)
    length = 4 + 2 * place_bytes  # of an entry: its tag, its type, a count, and a value or its place
    end = begin + number_bytes + length * number
    places = range(begin + number_bytes, end, length)
    kept = [
        data[place : place + length] for place in places if _is_kept(*struct.unpack_from(f"{order}HH", data, place))
    ]
    end += place_bytes  # of the next directory's place
    shorter = struct.pack(order + number_type, len(kept)) + b"".join(kept) + data[end - place_bytes : end]
    return data[:begin] + shorter.ljust(end - begin, b"\0") + data[end:]


def _is_kept(tag: int, kind: int) -> bool:
    return tag not in TIFF_DIRECTORIES and (tag != TIFF_XMP or kind in TIFF_TYPES_OF_XMP)
