"""Image files of every kind become RGB, as a person would see them."""

import struct
from pathlib import Path

import numpy as np
import pytest
from made_media import picture
from PIL import Image, ImageCms

from nemo_care.data.images import ImageFile
from nemo_care.data.media_errors import UnreadableMedia

FILES = Path(__file__).parents[1] / "files/media"
COLOURS = picture(20, 30)
ALPHA = picture(20, 30, 1)[..., 0]


def read(path):
    file = ImageFile(path)
    frame = file.frame().numpy()
    assert frame.shape == (file.height, file.width, 3)
    assert frame.dtype == np.uint8
    return frame


def on_white(colours, alpha):
    """The formula, in floats."""
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path, orientation):
    pixels = picture(20, 30)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    file = ImageFile(tmp_path / "a.png")
    size, frame = (file.height, file.width), file.frame().numpy()
    assert frame.shape == (*size, 3)
    expected = {1: pixels, 3: np.rot90(pixels, 2), 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}
    if orientation in expected:
        np.testing.assert_array_equal(frame, expected[orientation])


def test_an_image_without_colour_is_read_as_rgb(tmp_path):
    Image.new("L", (30, 20), 7).save(tmp_path / "a.png")
    assert ImageFile(tmp_path / "a.png").frame().unique().tolist() == [7]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "there is no such file"),
        (b"", "the file is empty"),
        (b"not an image", "it can't be decoded as an image"),
        ("cut off", r"it can't be decoded as an image \(image file is truncated"),
    ],
)
def test_an_unreadable_image_is_named_with_its_cause(tmp_path, content, cause):
    path = tmp_path / "a.png"
    if content == "cut off":
        Image.fromarray(picture(60, 60)).save(path)
        content = path.read_bytes()[:5000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableMedia, match=rf"a\.png: image not readable: {cause}"):
        ImageFile(path).frame()


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.webp"])
def test_a_transparent_image_is_laid_on_white(tmp_path, name):
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    image.save(tmp_path / name, lossless=True)
    np.testing.assert_allclose(read(tmp_path / name), on_white(COLOURS, ALPHA), atol=1.01)


def test_black_strokes_on_a_transparent_ground_stay_visible():
    frame = read(FILES / "transparent_diagram.png")
    assert frame[0, 0].tolist() == [255, 255, 255]
    assert frame.min() == 0
    assert 0 < (frame == 0).mean() < 0.5


def test_a_grey_image_with_alpha_is_laid_on_white(tmp_path):
    grey = COLOURS[..., 0]
    Image.fromarray(np.dstack([grey, ALPHA]), "LA").save(tmp_path / "a.png")
    expected = on_white(np.dstack([grey] * 3), ALPHA)
    np.testing.assert_allclose(read(tmp_path / "a.png"), expected, atol=1.01)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_transparent_colour_of_a_palette_is_white(tmp_path, name):
    image = Image.fromarray(COLOURS).quantize(8)
    image.save(tmp_path / name, transparency=3)
    places = np.asarray(image)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[places == 3] = 255
    assert (places == 3).any()
    np.testing.assert_array_equal(read(tmp_path / name), expected)


def test_a_palette_with_degrees_of_transparency_is_laid_on_white(tmp_path):
    image = Image.fromarray(COLOURS).quantize(4)
    degrees = np.array([0, 100, 200, 255], np.uint8)
    image.save(tmp_path / "a.png", transparency=degrees.tobytes())
    expected = on_white(np.asarray(image.convert("RGB")), degrees[np.asarray(image)])
    np.testing.assert_allclose(read(tmp_path / "a.png"), expected, atol=1.01)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_single_transparent_colour_is_white(tmp_path, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    colour = image.getpixel((4, 7))
    image.save(tmp_path / "a.png", transparency=colour)
    expected = np.asarray(image.convert("RGB")).copy()
    assert expected[7, 4].max() < 255
    expected[(np.asarray(image).reshape(20, 30, -1) == colour).all(axis=2)] = 255
    np.testing.assert_array_equal(read(tmp_path / "a.png"), expected)


SIXTEEN = (np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)


def write_pgm(path, values, most):
    path.write_bytes(
        b"P5 %d %d %d\n" % (*values.shape[::-1], most) + values.astype(">u2").tobytes()
    )


def write_tiff(path, data, bits, photometric):
    """A grey TIFF of 30 x 20 pixels; PIL itself writes no 12 bits and no inverted greys."""
    tags = {256: 30, 257: 20, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: 20}
    tags[279] = len(data)
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    header += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(header.ljust(200, b"\0") + data)


def sixteen_bits(path, kind):
    if kind == "png":
        Image.fromarray(SIXTEEN).save(path.with_suffix(".png"))
    elif kind == "tiff":
        Image.fromarray(SIXTEEN).save(path.with_suffix(".tiff"))
    elif kind == "big-endian tiff":
        data = SIXTEEN.astype(">u2").tobytes()
        Image.frombytes("I;16B", (30, 20), data).save(path.with_suffix(".tiff"))
    elif kind == "inverted tiff":
        write_tiff(path.with_suffix(".tiff"), (65535 - SIXTEEN).tobytes(), 16, 0)
    elif kind == "pgm":
        write_pgm(path.with_suffix(".pgm"), SIXTEEN, 65535)
    return next(path.parent.glob(f"{path.name}.*"))


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "inverted tiff", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, kind):
    frame = read(sixteen_bits(tmp_path / "a", kind))
    expected = np.dstack([SIXTEEN / 65535 * 255] * 3)
    np.testing.assert_allclose(frame, expected, atol=0.5 + 1e-6)


def test_twelve_bits_of_a_tiff_are_scaled_by_their_own_range(tmp_path):
    values = np.linspace(0, 4095, 600).astype(int)
    pairs = zip(values[::2].tolist(), values[1::2].tolist(), strict=True)
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in pairs)
    write_tiff(tmp_path / "a.tiff", packed, 12, 1)
    frame = read(tmp_path / "a.tiff")[..., 0]
    np.testing.assert_allclose(frame.ravel(), values / 4095 * 255, atol=0.5 + 1e-6)


@pytest.mark.parametrize("most", [1, 255])
def test_floats_from_0_to_1_or_to_255_are_scaled(tmp_path, most):
    values = np.linspace(0, most, 600, dtype=np.float32).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    expected = np.dstack([np.linspace(0, 255, 600).reshape(20, 30)] * 3)
    np.testing.assert_allclose(read(tmp_path / "a.tiff"), expected, atol=0.51)


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1000, 600, dtype=np.float32),
        np.linspace(-1, 1, 600, dtype=np.float32),
        np.full(600, np.nan, np.float32),
        np.arange(600, dtype=np.int32),
    ],
    ids=["large", "negative", "nan", "integers"],
)
def test_greys_without_a_known_range_are_refused(tmp_path, values):
    Image.fromarray(values.reshape(20, 30)).save(tmp_path / "a.tiff")
    with pytest.raises(UnreadableMedia, match=r"a\.tiff: image not readable.*no known range"):
        read(tmp_path / "a.tiff")


def test_colour_spaces_are_converted(tmp_path):
    image = Image.fromarray(np.full((20, 30, 3), (200, 90, 40), np.uint8))
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    for number, converted in enumerate((lab, image.convert("CMYK"), image.convert("YCbCr"))):
        converted.save(tmp_path / f"{number}.tiff")
        frame = read(tmp_path / f"{number}.tiff")
        np.testing.assert_allclose(frame, np.asarray(image), atol=4, err_msg=converted.mode)


def test_black_and_white_are_0_and_255(tmp_path):
    image = Image.fromarray(COLOURS).convert("1")
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        read(tmp_path / "a.png"), np.dstack([np.asarray(image) * np.uint8(255)] * 3)
    )


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_the_first_picture_of_several_is_the_image(tmp_path, name):
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
    assert np.abs(read(tmp_path / name).astype(int) - (255, 0, 0)).max() <= 1
