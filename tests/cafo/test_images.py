import io
import logging
import zlib

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from cafo import images
from cafo.errors import ImageError
from cafo.images import CLIP_MEAN, CLIP_STD, THIN, Preprocess, load_image, random_view


def gradient(width=37, height=23):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 11, (x + y) * 4], axis=-1).astype(np.uint8))


def encoded(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


PREPROCESS = Preprocess(size=16, resize=16)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    image = gradient().convert(mode)
    loaded = load_image(encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert (loaded.mode, loaded.size) == ("RGB", (37, 23))
    assert np.array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 37 * 23).reshape(23, 37).astype(np.uint16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(values), "PNG")))
    assert np.array_equal(loaded[..., 0], values // 257)
    with pytest.raises(ImageError, match="floating-point"):
        load_image(encoded(Image.fromarray(np.ones((3, 5), np.float32)), "TIFF"))


def test_transparency_lies_over_white():
    pixels = np.zeros((5, 7, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    loaded = np.asarray(load_image(encoded(Image.fromarray(pixels), "PNG")))
    assert loaded[0, 0].tolist() == [10, 20, 30]
    assert loaded[4, 6].tolist() == [255, 255, 255]
    palette = Image.fromarray(np.zeros((5, 7), np.uint8)).convert("P")
    assert np.asarray(load_image(encoded(palette, "GIF", transparency=0)))[2, 2].tolist() == [255, 255, 255]


def test_exif_rotation_and_the_first_frame():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(gradient(), "JPEG", exif=exif)).size == (23, 37)
    frames = [Image.new("RGB", (7, 5), colour) for colour in ("red", "blue")]
    assert np.asarray(load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))[2, 2, 0] > 250


def bomb():
    """A valid PNG header that promises 60,000 x 60,000 pixels."""
    header = b"\0\0\xea\x60\0\0\xea\x60\x08\x02\0\0\0"
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + b"\0\0\0\r" + chunk + zlib.crc32(chunk).to_bytes(4, "big")


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", encoded(gradient(), "JPEG")[:200], encoded(gradient(97, 89), "PNG")[:-40], bomb()],
    ids=["empty", "text", "truncated jpeg", "truncated png", "bomb"],
)
def test_an_unusable_image_is_named(content, tmp_path):
    (tmp_path / "picture.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"picture\.jpg"):
        load_image(tmp_path / "picture.jpg")
    with pytest.raises(ImageError, match="row 7"):
        load_image(content, name="row 7")


def test_size_is_bounded_and_missing_files_are_named(tmp_path):
    with pytest.raises(ImageError, match="37 x 23"):
        load_image(encoded(gradient(), "PNG"), max_pixels=37 * 23 - 1)
    assert load_image(encoded(gradient(), "PNG"), max_pixels=37 * 23).size == (37, 23)
    with pytest.raises(ImageError, match=r"none\.png"):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(37, 23), (23, 37), (16, 16), (7, 5), (211, 17)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocessing_is_open_clips(size, mode):
    ours = Preprocess(size=16, resize=16, mode=mode)
    theirs = open_clip.image_transform(16, False, CLIP_MEAN, CLIP_STD, resize_mode=mode, interpolation="bicubic")
    torch.testing.assert_close(ours(gradient(*size)), theirs(gradient(*size)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 60_000), (2_000_000, 2), (7, 5_000)])
def test_a_thin_image_takes_no_more_memory_than_its_middle(size):
    """All of it, resized to 16 pixels wide, would be a million pixels high and more."""
    pixels = np.broadcast_to(np.arange(max(size), dtype=np.uint8), (min(size), max(size)))
    image = Image.fromarray(np.ascontiguousarray(pixels if size[0] > size[1] else pixels.T))
    resized = []
    original = Image.Image.resize

    def resize(self, size, *args, **kwargs):
        resized.append(size)
        return original(self, size, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        view = PREPROCESS(image)
        PREPROCESS.view(image, "a.png", 0, 0)
    assert view.isfinite().all()
    assert all(max(shape) <= 16 * THIN for shape in resized)
    if min(size) > 2:
        theirs = open_clip.image_transform(16, False, CLIP_MEAN, CLIP_STD, interpolation="bicubic")
        torch.testing.assert_close(view, theirs(image), rtol=0, atol=1e-6)


def test_a_view_depends_on_seed_key_and_index_alone():
    image = gradient()
    view = PREPROCESS.view(image, "a.jpg", 3, 5)
    assert view.shape == (3, 16, 16)
    torch.manual_seed(1)
    assert torch.equal(PREPROCESS.view(image, "a.jpg", 3, 5), view)
    for other in (("b.jpg", 3, 5), ("a.jpg", 4, 5), ("a.jpg", 3, 6)):
        assert not torch.equal(PREPROCESS.view(image, *other), view)


def test_views_are_not_mirrored_where_a_mirror_image_is_another_class():
    image = gradient()
    for index in range(8):
        mirrored = random_view(*image.size, key="a.jpg", index=index, seed=5)[4]
        flipped, plain = (PREPROCESS.view(image, "a.jpg", index, 5, flips=flips) for flips in (True, False))
        assert torch.equal(flipped, plain.flip(2) if mirrored else plain)


def test_views_keep_to_their_ranges():
    boxes = [random_view(311, 211, key="x", index=i, seed=0) for i in range(500)]
    areas = [w * h / (311 * 211) for _, _, w, h, _ in boxes]
    assert 0.49 < min(areas) < 0.55
    assert 0.9 < max(areas) <= 1
    assert all(0.74 < w / h < 1.35 and x >= 0 and y >= 0 and x + w <= 311 and y + h <= 211 for x, y, w, h, _ in boxes)
    assert 200 < sum(flip for *_, flip in boxes) < 300
    large = [random_view(311, 211, key="x", index=i, seed=0, min_area=0.9) for i in range(50)]
    assert all(w * h > 0.88 * 311 * 211 for _, _, w, h, _ in large)
    assert random_view(1000, 3, key="x", index=0, seed=0)[2:4] == (4, 3)
    assert random_view(1, 1, key="x", index=0, seed=0)[2:4] == (1, 1)


def pixels_of(image):
    return np.asarray(load_image(image)).tolist()


@pytest.mark.parametrize("form", ["rotated", "transparent", "16 bits", "palette", "CMYK", "two frames"])
def test_a_pil_image_is_read_like_its_file(tmp_path, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, path, more = gradient(), tmp_path / "x.png", {}
    if form == "rotated":
        path, more = tmp_path / "x.jpg", {"exif": exif}
    elif form == "transparent":
        image = image.copy()
        image.putalpha(Image.fromarray(np.arange(37 * 23, dtype=np.uint16).reshape(23, 37).astype(np.uint8)))
    elif form == "16 bits":
        image = Image.fromarray(np.linspace(0, 65535, 37 * 23).reshape(23, 37).astype(np.uint16))
    elif form == "palette":
        image, path, more = image.convert("P"), tmp_path / "x.gif", {"transparency": 3}
    elif form == "CMYK":
        image, path = image.convert("CMYK"), tmp_path / "x.tif"
    else:
        path, more = tmp_path / "x.gif", {"save_all": True, "append_images": [Image.new("RGB", (37, 23), "blue")]}
    image.save(path, **more)
    with Image.open(path) as opened:
        for other in (opened, path.read_bytes(), str(path)):
            assert pixels_of(other) == pixels_of(path)
        assert torch.equal(PREPROCESS(opened), PREPROCESS(load_image(path)))
        assert torch.equal(*[PREPROCESS.view(image, "x", 1, 0) for image in (opened, load_image(path))])


def test_arrays_are_images():
    pixels = np.asarray(gradient())
    for array in (pixels, pixels / 255, (pixels / 255).astype(np.float32), pixels[:, ::-1][:, ::-1]):
        assert pixels_of(array) == pixels.tolist()
    assert pixels_of(pixels[..., 0]) == pixels_of(pixels[..., :1]) == pixels_of(Image.fromarray(pixels[..., 0]))
    wide = np.linspace(0, 65535, 35).reshape(5, 7).astype(np.uint16)
    assert pixels_of(wide) == pixels_of(Image.fromarray(wide))
    with_alpha = np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=2)
    assert np.asarray(load_image(with_alpha)).min() == 255


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 5, 7), np.uint8), "channels last"),
        (np.full((5, 7, 3), 2.0), "from 0 to 1, got 2 to 2"),
        (np.full((5, 7, 3), np.nan), "from 0 to 1, got nan"),
        (np.zeros((5, 7, 3), np.int64), "uint8, uint16 or floating point"),
        (np.zeros((0, 7, 3), np.uint8), "has the shape"),
        (torch.zeros(5, 7, 3), "a Tensor is no image"),
    ],
)
def test_other_arrays_are_refused_with_what_is_expected(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


@pytest.fixture
def odd_images(monkeypatch, caplog):
    """The log of odd images, as if none was seen before."""
    monkeypatch.setattr(images, "_WARNED", set())
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize(("dtype", "kind"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF")])
def test_8_bit_values_in_a_wide_format_are_not_black(tmp_path, odd_images, dtype, kind):
    values = np.arange(37 * 23).reshape(23, 37) % 251
    for name in ("a", "b"):
        Image.fromarray(values.astype(dtype)).save(tmp_path / name, kind)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a"))[..., 0], values)
    load_image(tmp_path / "b")
    (record,) = odd_images.records  # once
    assert "/a has no value above 255 in a 16-bit or wider format" in record.getMessage()


def test_other_dark_images_are_logged(tmp_path, odd_images):
    twelve_bits = np.full((5, 7), 4095, np.uint16)
    Image.fromarray(twelve_bits).save(tmp_path / "twelve.png")
    assert np.asarray(load_image(tmp_path / "twelve.png")).max() == 15
    assert "twelve.png is nearly black: its largest value is 4095 of 65535" in odd_images.text
    black = np.zeros((5, 7), np.uint16)
    Image.fromarray(black).save(tmp_path / "black.png")
    assert np.asarray(load_image(tmp_path / "black.png")).max() == 0
    assert len(odd_images.records) == 1  # black on purpose

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    rows = b"".join(b"\0" + bytes([0, 200] * 3 * 7) for _ in range(5))  # 16-bit RGB with values of 200
    header = (7).to_bytes(4, "big") + (5).to_bytes(4, "big") + b"\x10\x02\0\0\0"
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    load_image(png, name="rgb.png")
    assert "rgb.png is black: Pillow keeps the high byte of 16-bit colours" in odd_images.text


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "x.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    for source in (tmp_path / "x.jpg", (tmp_path / "x.jpg").read_bytes()):
        with pytest.raises(ImageError, match="is a Git LFS pointer, not the image itself"):
            load_image(source)
