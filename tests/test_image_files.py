"""Image files by their own bytes, against files that Pillow wrote."""

from __future__ import annotations

import io
from typing import Any

import image_gen
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from image_gen import Picture, probe
from PIL import ExifTags, Image

SIZE = (33, 17)


def encoded(image_format: str, mode: str, size: tuple[int, int] = SIZE, **options: object) -> bytes:
    """A picture with detail, so that its pixels take some bytes."""
    gradient = Image.radial_gradient("L").resize(size)
    file = io.BytesIO()
    if mode in ("LA", "RGBA"):
        image = Image.merge(mode, [gradient] * len(mode))
    else:
        image = gradient.convert(mode)
    image.save(file, image_format, **options)
    return file.getvalue()


class Bounded(io.BytesIO):
    """A file whose reader goes forward: one that turns in circles fails instead of hanging."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        assert self.reads < 1000
        return super().read(size)


def probed(data: bytes) -> Picture | None:
    return probe(Bounded(data))


FRAMES: dict[str, Any] = {"save_all": True, "append_images": [Image.new("L", SIZE, 9)]}
# A whole JPEG of another size inside the first segment, as cameras put their previews there.
PREVIEW: dict[str, Any] = {"exif": b"Exif\0\0" + encoded("JPEG", "L", (8, 8))}
KINDS = {
    "png, 1 bit": ("png", False, encoded("PNG", "1")),
    "png, grey": ("png", False, encoded("PNG", "L")),
    "png, 16 bit": ("png", False, encoded("PNG", "I;16")),
    "png, grey and alpha": ("png", True, encoded("PNG", "LA")),
    "png, RGB": ("png", False, encoded("PNG", "RGB")),
    "png, RGBA": ("png", True, encoded("PNG", "RGBA")),
    "png, palette": ("png", False, encoded("PNG", "P")),
    "png, palette with alpha": ("png", True, encoded("PNG", "P", transparency=0)),
    "png, transparent grey": ("png", True, encoded("PNG", "L", transparency=0)),
    "png, transparent colour": ("png", True, encoded("PNG", "RGB", transparency=(0, 0, 0))),
    "png, chunks before the pixels": ("png", False, encoded("PNG", "RGB", dpi=(72, 72), **PREVIEW)),
    "png, animated": ("png", False, encoded("PNG", "L", **FRAMES)),
    "jpeg, grey": ("jpeg", False, encoded("JPEG", "L")),
    "jpeg, RGB": ("jpeg", False, encoded("JPEG", "RGB")),
    "jpeg, CMYK": ("jpeg", False, encoded("JPEG", "CMYK")),
    "jpeg, progressive": ("jpeg", False, encoded("JPEG", "RGB", progressive=True)),
    "jpeg, optimised": ("jpeg", False, encoded("JPEG", "RGB", optimize=True)),
    "jpeg, restart markers": ("jpeg", False, encoded("JPEG", "RGB", restart_marker_rows=1)),
    "jpeg, profile of two segments": ("jpeg", False, encoded("JPEG", "L", icc_profile=b"x" * 9**5)),
    "jpeg, preview inside": ("jpeg", False, encoded("JPEG", "RGB", **PREVIEW)),
    "webp, lossy": ("webp", False, encoded("WEBP", "RGB")),
    "webp, lossless": ("webp", False, encoded("WEBP", "RGB", lossless=True)),
    "webp, lossy with alpha": ("webp", True, encoded("WEBP", "RGBA")),
    "webp, lossless with alpha": ("webp", True, encoded("WEBP", "RGBA", lossless=True)),
    "webp, extended without alpha": ("webp", False, encoded("WEBP", "RGB", **PREVIEW)),
    "webp, animated": ("webp", True, encoded("WEBP", "RGBA", **FRAMES)),
}
ODDITIES = {
    "png, 16 bit": image_gen.DEEP,
    "png, animated": "animated",
    "webp, animated": "animated",
    "jpeg, CMYK": "CMYK",
}
SMALL_KINDS = {name: data for name, (_, _, data) in KINDS.items() if len(data) < 2000}


@pytest.mark.parametrize("kind", KINDS)
def test_format_size_and_alpha_are_read_from_a_whole_file(kind: str) -> None:
    image_format, alpha, data = KINDS[kind]
    oddity = ODDITIES.get(kind, "")
    assert probed(data) == Picture(image_format, *SIZE, alpha=alpha, whole=True, oddity=oddity)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (4096, 16), (16383, 1)], ids=str)
def test_sizes_are_read_to_the_last_pixel(image_format: str, size: tuple[int, int]) -> None:
    picture = probed(encoded(image_format, "L", size))
    assert picture is not None
    assert (picture.width, picture.height) == size
    assert picture.size == f"{size[0]}x{size[1]}"


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_a_file_that_is_cut_anywhere_is_not_whole(kind: str) -> None:
    data = SMALL_KINDS[kind]
    for length in range(len(data)):
        picture = probed(data[:length])
        assert picture is None or not picture.whole, length


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_last_bytes_are_missing_still_says_what_it_is(kind: str) -> None:
    image_format, alpha, data = KINDS[kind]
    oddity = ODDITIES.get(kind, "")
    cut = Picture(image_format, *SIZE, alpha=alpha, whole=False, oddity=oddity)
    assert probed(data[:-1]) == cut


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_lies_on_its_side_is_known(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = probed(encoded(image_format, "RGB", (64, 32), exif=exif))
    assert picture is not None
    assert (picture.orientation, picture.size) == (orientation, "64x32")
    assert picture.upright.size == ("32x64" if orientation > 4 else "64x32")


def test_only_the_orientation_of_the_picture_itself_counts() -> None:
    """Not that of its thumbnail, and not letters in another chunk."""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.IFD1)[ExifTags.Base.Orientation] = 6
    for order in ("<", ">"):
        exif.endian = order
        picture = probed(encoded("JPEG", "RGB", (64, 32), exif=exif))
        assert picture is not None
        assert picture.orientation == 1
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 8
    data = encoded("WEBP", "RGB", (64, 32), exif=turned, xmp=b"<x>EXIF and more EXIF text</x>")
    picture = probed(data)
    assert picture is not None
    assert picture.orientation == 8


def test_fill_bytes_before_a_marker_of_a_jpeg_are_skipped() -> None:
    _, _, data = KINDS["jpeg, RGB"]
    filled = data.replace(b"\xff\xdb", b"\xff\xff\xff\xdb")
    assert probed(filled) == Picture("jpeg", *SIZE, alpha=False, whole=True)


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        pytest.param(encoded("GIF", "P"), True, id="whole"),
        pytest.param(encoded("GIF", "P")[:-1], False, id="cut"),
    ],
)
def test_a_gif_is_known_as_one(data: bytes, *, whole: bool) -> None:
    assert probed(data) == Picture("gif", *SIZE, alpha=False, whole=whole)


@pytest.mark.parametrize(
    ("head", "size"),
    [
        pytest.param(b'<?xml version="1.0"?>\n<svg width="30" height="20">', "30x20", id="xml"),
        pytest.param(b'\xef\xbb\xbf<svg width="30px" height="20px">', "30x20", id="BOM, px"),
        pytest.param(b"<!-- by hand -->\n<svg viewBox='0 0 9 9'>", "0x0", id="comment"),
        pytest.param(b"<!DOCTYPE svg>\n<svg\nwidth='100%'>", "0x0", id="doctype"),
    ],
)
def test_an_svg_may_begin_in_several_ways(head: bytes, size: str) -> None:
    whole, cut = (probed(head + end) for end in (b"<path/></svg>\n", b"<path/>"))
    assert whole is not None
    assert cut is not None
    assert (whole.format, whole.size, whole.alpha) == ("svg", size, True)
    assert (whole.whole, cut.whole) == (True, False)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0" * 100, id="zeros"),
        pytest.param(b"a fox\n", id="text"),
        pytest.param(encoded("BMP", "RGB"), id="bmp"),
        pytest.param(encoded("TIFF", "RGB"), id="tiff"),
        pytest.param(encoded("AVIF", "RGB"), id="avif"),
        pytest.param(b"RIFF\x24\0\0\0WAVEfmt ", id="another RIFF"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"\0" * 40, id="png without IHDR"),
        pytest.param(b"\x89PNG\n\x1a\n" + KINDS["png, RGB"][2][8:], id="png after a text transfer"),
        pytest.param(b"\n" + KINDS["jpeg, RGB"][2], id="jpeg behind a line end"),
        pytest.param(b"<html><body>502 Bad Gateway</body></html>", id="html"),
    ],
)
def test_what_is_no_image_is_none(data: bytes) -> None:
    assert probed(data) is None


SIGNATURES = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\xff\xd8\xff",
    b"\xff\xd8\xff\xc0\0\x11\x08",
    b"\xff\xd8\xff\xe0\0\0\xff\xe0\0\1\xff\xd9",
    b"RIFF\x10\0\0\0WEBP",
    b"RIFF\x10\0\0\0WEBPVP8X",
    b"RIFF\x10\0\0\0WEBPVP8L",
    b"GIF89a",
    b"<svg",
    b'<svg width="1.2.3" height=".">',
    b'<svg width="' + b"9" * 5000 + b'">',
]


@given(signature=st.sampled_from(SIGNATURES), rest=st.binary(max_size=64))
@example(signature=SIGNATURES[2], rest=b"")
@example(signature=SIGNATURES[11], rest=b"")
@example(signature=SIGNATURES[12], rest=b"")
def test_bytes_behind_any_signature_are_judged_and_never_crash(
    signature: bytes, rest: bytes
) -> None:
    picture = probed(signature + rest)
    assert picture is None or (picture.width >= 0 and picture.height >= 0)
