"""Photographs as people have them."""

import numpy as np
import pytest
import torch
from pack.models.errors import PersonalizeError
from pack.models.pictures import (
    CLIP_MEAN,
    Picture,
    box_of,
    crop_square,
    cut_out,
    frame_picture,
    list_pictures,
    make_picture,
    on_ground,
    read_picture,
    same_aspect,
)
from pack.models.references import parse_weights
from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves():
    """Red above, blue below."""
    image = Image.new("RGB", (60, 40), RED)
    image.paste(BLUE, (0, 20, 60, 40))
    return image


def is_upright(picture, tolerance=0.1):
    top, bottom = picture.pixels[2].mean(dim=0), picture.pixels[-3].mean(dim=0)
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    return torch.allclose(torch.stack((top, bottom)), expected, atol=tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = halves()
    inverse = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    for operation in inverse:
        stored = stored.transpose(Image.Transpose(operation))
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    picture = read_picture(tmp_path / "photo.jpg")
    assert picture.pixels.shape == (40, 60, 3)
    assert is_upright(picture)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.png"),
        ("P", "a.gif"),
        ("P", "a.png"),
        ("CMYK", "a.jpg"),
        ("RGB", "a.webp"),
        ("RGB", "a.tiff"),
        ("RGB", "a.bmp"),
    ],
)
def test_modes_and_types(tmp_path, mode, name):
    halves().convert(mode).save(tmp_path / name)
    assert is_upright(read_picture(tmp_path / name), tolerance=0.15)


def test_grey_and_sixteen_bit(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "grey.png")
    deep, grey = read_picture(tmp_path / "deep.png"), read_picture(tmp_path / "grey.png")
    torch.testing.assert_close(deep.pixels, grey.pixels, atol=1.01 / 255, rtol=0)
    assert float(deep.pixels.max()) > 0.99


def test_the_first_picture_of_an_animation(tmp_path):
    halves().save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (60, 40))])
    assert is_upright(read_picture(tmp_path / "a.gif"))


def test_alpha_and_mask_files_are_masks(tmp_path):
    image = halves().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.paste(RED, (20, 10, 40, 30))
    image.save(tmp_path / "a.png")
    mask = read_picture(tmp_path / "a.png").mask
    assert mask.sum() == 20 * 20
    halves().save(tmp_path / "b.jpg")
    halves().convert("L").point(lambda value: 255 if value > 50 else 0).save(tmp_path / "b-masklabel.png")
    mask = read_picture(tmp_path / "b.jpg").mask
    assert float(mask[:20].min()) == 1
    assert float(mask[20:].max()) == 0
    assert [path.name for path in list_pictures(tmp_path)] == ["a.png", "b.jpg"]


def test_hidden_and_other_files_are_left_out(tmp_path):
    for name in ("._1.jpg", ".hidden.png", "notes.txt", "B.PNG", "a é.jpeg"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_pictures(tmp_path)] == ["a é.jpeg", "B.PNG"]


def test_bad_folders_and_files(tmp_path):
    with pytest.raises(PersonalizeError, match="does not exist"):
        list_pictures(tmp_path / "none")
    with pytest.raises(PersonalizeError, match="has no pictures"):
        list_pictures(tmp_path)
    halves().save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    for name, content in {"cut.jpg": data[: len(data) // 2], "text.jpg": b"hello", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PersonalizeError, match=f"{name} in .* cannot be read") as error:
            read_picture(tmp_path / name)
        assert "\n" not in str(error.value)
    Image.new("RGB", (8, 20)).save(tmp_path / "tiny.png")
    with pytest.raises(PersonalizeError) as error:
        read_picture(tmp_path / "tiny.png")
    assert str(error.value) == f"tiny.png in {tmp_path} is 8x20 pixels: at least 16 on each side are needed."
    assert read_picture(tmp_path / "whole.jpg").name == "whole.jpg"


def test_bad_pixels():
    with pytest.raises(PersonalizeError, match="image0 is 1x1 pixels: at least 16 on each side are needed"):
        make_picture(torch.zeros(1, 1, 3), None, "image0")
    broken = torch.zeros(20, 20, 3)
    broken[3, 4, 1] = float("nan")
    with pytest.raises(PersonalizeError, match="image0 has values that are not numbers"):
        make_picture(broken, None, "image0")


def test_masks():
    pixels = torch.rand(40, 60, 3)
    with pytest.raises(PersonalizeError, match="mask of image0 is 40x40 but the picture is 60x40"):
        make_picture(pixels, torch.rand(40, 40), "image0")
    with pytest.raises(PersonalizeError, match="mask of image0 has values that are not numbers"):
        make_picture(pixels, torch.full((40, 60), float("nan")), "image0")
    assert make_picture(pixels, torch.rand(20, 30), "image0").mask.shape == (40, 60)
    assert make_picture(pixels, torch.zeros(64, 64), "image0").mask is None, "Load Image gives this where there is none"
    assert make_picture(pixels, torch.ones(40, 60), "image0").mask is None
    assert make_picture(torch.rand(40, 60, 4), None, "image0").mask.shape == (40, 60)


@pytest.mark.parametrize(
    ("size", "other", "same"),
    [
        ((64, 64), (512, 512), True),
        ((64, 64), (1000, 1000), True),
        ((16, 16), (128, 80), False),
        ((96, 64), (768, 512), True),
        ((96, 64), (770, 515), True),
        ((96, 64), (512, 768), False),
        ((96, 64), (700, 512), False),
        ((667, 1000), (200, 300), True),
        ((667, 1000), (200, 310), False),
        ((1, 1), (64, 64), True),
    ],
)
def test_same_aspect(size, other, same):
    assert same_aspect(*size, *other) is same


def test_crop_is_the_preprocessing_of_clip():
    """Shorter side to the encoder's size, centre crop: transformers' CLIPImageProcessor without normalisation."""
    picture = make_picture(torch.rand(50, 90, 3), None, "a")
    framed = frame_picture(picture, "crop", 32)
    whole = torch.nn.functional.interpolate(
        picture.pixels.permute(2, 0, 1)[None], (32, 58), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(framed, whole[0, :, :, 13:45].permute(1, 2, 0).clamp(0, 1))


def test_squares_of_a_picture():
    rows = torch.arange(40.0)[:, None, None].expand(40, 60, 3) / 40
    columns = torch.arange(60.0)[None, :, None].expand(40, 60, 3) / 60
    for side, across, down, size, top, left in (
        (0.5, 0, 0, 20, 0, 0),
        (0.5, 1, 1, 20, 20, 40),
        (1, 0.5, 0.5, 40, 0, 10),
    ):
        for pixels in (rows, columns):
            square = crop_square(Picture(pixels, None, "p"), side, across, down)
            assert torch.equal(square.pixels, pixels[top : top + size, left : left + size])
    assert crop_square(Picture(rows, None, "p"), 0.001, 0, 0).pixels.shape == (1, 1, 3)
    mask = torch.zeros(40, 60)
    mask[10:30, 20:50] = 1
    square = crop_square(Picture(torch.full((40, 60, 3), 0.9), mask, "p"), 1, 0, 0)
    assert square.mask is None
    assert torch.equal(square.pixels, torch.full((20, 20, 3), 0.9)), "of the subject"


def test_pad_shows_everything_on_the_mean_colour():
    framed = frame_picture(make_picture(torch.ones(30, 60, 3), None, "a"), "pad", 60)
    assert framed.shape == (60, 60, 3)
    torch.testing.assert_close(framed[0, 0], torch.tensor(CLIP_MEAN))
    torch.testing.assert_close(framed[30, 0], torch.ones(3))


@pytest.mark.parametrize("framing", ["crop", "pad"])
def test_a_mask_isolates_and_centres_the_subject(framing):
    pixels = torch.rand(100, 100, 3)
    pixels[60:80, 70:90] = 1.0
    mask = torch.zeros(100, 100)
    mask[60:80, 70:90] = 1
    framed = frame_picture(make_picture(pixels, mask, "a"), framing, 44)
    torch.testing.assert_close(framed[0, 0], torch.tensor(CLIP_MEAN), atol=0.01, rtol=0)
    torch.testing.assert_close(framed[22, 22], torch.ones(3))
    white = (framed > 0.99).all(dim=-1).float().mean()
    assert 0.7 < float(white) < 1.0


def test_a_subject_that_is_cut_out():
    pixels, inside = torch.rand(9, 12, 3), torch.zeros(9, 12, dtype=torch.bool)
    inside[1:4, 2:8] = True
    inside[1, 2] = False
    assert box_of(inside) == (2, 1, 8, 4)
    square = cut_out(pixels, inside)
    assert square.shape == (6, 6, 4)
    assert torch.equal(square[2:5, :, 3].bool(), inside[1:4, 2:8]), "in the middle, the odd row below"
    assert not square[:2].any()
    assert not square[5:].any()
    assert not square[2, 0].any()
    assert torch.equal(square[2:5, 1:, :3], pixels[1:4, 3:8])
    tall = cut_out(pixels.movedim(0, 1), inside.movedim(0, 1))
    assert torch.equal(tall, square.movedim(0, 1))
    with pytest.raises(ValueError, match="empty mask"):
        cut_out(pixels, torch.zeros_like(inside))


def test_on_which_ground_it_stands():
    square = torch.zeros(4, 4, 4)
    square[:, :2] = torch.tensor([0.5, 0.25, 0.0, 1.0])
    white, ground = on_ground(square, 4), torch.rand(4, 4, 3)
    assert (white[:, :2] * 255).round().unique().tolist() == [0, 64, 128]
    assert (white[:, 2:] == 1).all()
    other = on_ground(square, 4, ground)
    assert torch.equal(other[:, :2], white[:, :2])
    assert (other[:, 2:] - ground[:, 2:]).abs().max() <= 0.5 / 255 + 1e-6
    large = on_ground(square, 16)
    assert large.shape == (16, 16, 3)
    assert 0 <= large.min() <= large.max() <= 1
    torch.testing.assert_close(large * 255, (large * 255).round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "expected"), [("", [1, 1, 1]), ("0.5", [0.5] * 3), ("1, 0;2", [1, 0, 2]), ("1\n1 3", [1, 1, 3])]
)
def test_weights(text, expected):
    assert parse_weights(text, "abc") == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("1, 2", "2 weights for 3 references"), ("1, x, 2", "not numbers"), ("1,-1,1", "0 or more"), ("nan", "0 or more")],
)
def test_bad_weights(text, sentence):
    with pytest.raises(PersonalizeError, match=sentence):
        parse_weights(text, "abc")


def test_the_real_photographs(photographs):
    pictures = [read_picture(path) for path in list_pictures(photographs / "mixed" / "dog")]
    assert [picture.name for picture in pictures] == [
        "grey.webp",
        "IMG_0001.JPG",
        "IMG_0002.jpeg",
        "portrait with alpha.png",
        "tiny été.png",
    ]


def test_pictures_that_pillow_cannot_read_are_named(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    assert [path.name for path in list_pictures(tmp_path)] == ["IMG_1.HEIC"]
    with pytest.raises(PersonalizeError, match=r"IMG_1\.HEIC in .*: save it as JPEG or PNG"):
        read_picture(tmp_path / "IMG_1.HEIC")


@pytest.mark.parametrize(("mode", "white"), [("F", 1.0), ("F", 255.0), ("I", 255), ("I", 65535)])
def test_deep_grey_tiffs(tmp_path, mode, white):
    values = np.tile(np.linspace(0, white, 32), (32, 1))
    Image.fromarray(values.astype(np.float32 if mode == "F" else np.int32)).save(tmp_path / "deep.tiff")
    pixels = read_picture(tmp_path / "deep.tiff").pixels
    torch.testing.assert_close(pixels[0, :, 0], torch.linspace(0, 1, 32), atol=0.005, rtol=0)


def test_small_mask_files_and_wild_values():
    pixels = torch.rand(40, 60, 3)
    mask = torch.zeros(4, 6)
    mask[1:3, 2:4] = 7.0
    picture = make_picture(pixels, mask, "a")
    assert 0 <= float(picture.mask.min()) <= float(picture.mask.max()) <= 1
    assert frame_picture(picture, "crop", 32).shape == (32, 32, 3)
    assert make_picture(torch.rand(40, 60, 1), -mask, "grey").pixels.shape == (40, 60, 3)
