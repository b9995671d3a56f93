import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import flashddpm as fd
from flashddpm.cli import main as cli
from flashddpm.io import images


def test_to_uint8_is_diffusers_rule():
    from diffusers.image_processor import VaeImageProcessor

    x = torch.linspace(-1.3, 1.3, 3 * 40 * 40).reshape(1, 3, 40, 40)
    theirs = VaeImageProcessor().postprocess(x, output_type="pil")[0]
    ours = fd.to_uint8(x)
    assert ours.dtype is torch.uint8 and ours.shape == x.shape
    assert np.array_equal(ours[0].permute(1, 2, 0).numpy(), np.asarray(theirs))


def test_grid_places_every_image_and_caption():
    x = torch.stack([torch.full((1, 4, 4), v) for v in (-1.0, 0.0, 1.0)])
    grid = np.asarray(fd.make_grid(x, columns=2, zoom=2))
    assert grid.shape == (2 + 2 * 10, 2 + 2 * 10, 3)
    for value, (row, column) in zip((0, 128, 255), ((0, 0), (0, 1), (1, 0)), strict=True):
        top, left = 2 + row * 10, 2 + column * 10
        assert (grid[top : top + 8, left : left + 8] == value).all()
    assert (grid[12:, 12:] == 255).all()
    captioned = np.asarray(fd.make_grid(x, columns=3, captions=["a", "b", "c"], zoom=8))
    assert (captioned[2:14] < 100).any()
    assert not (
        np.asarray(fd.make_grid(x, columns=3, captions=["", "", ""], zoom=8))[2:14] < 100
    ).any()


def test_colour_and_files(tmp_path):
    x = torch.zeros(2, 3, 4, 4)
    x[:, 0] = 1
    fd.save_grid(x, tmp_path / "new" / "grid.png")
    assert np.asarray(Image.open(tmp_path / "new" / "grid.png"))[3, 3].tolist() == [255, 128, 128]
    images.save_folder(x, tmp_path / "folder", [7, -2])
    assert sorted(f.name for f in (tmp_path / "folder").iterdir()) == ["-2.png", "7.png"]
    assert Image.open(tmp_path / "folder" / "7.png").size == (4, 4)
    (tmp_path / "folder" / "7.png").write_bytes(b"there before")
    assert images.save_folder(x, tmp_path / "folder", [7, 8]) == 1
    assert (tmp_path / "folder" / "7.png").read_bytes() == b"there before"
    assert Image.open(tmp_path / "folder" / "8.png").size == (4, 4)
    frames = [fd.make_grid(torch.full((1, 1, 4, 4), v)) for v in (-1.0, 0.0, 1.0)]
    images.save_gif(frames, tmp_path / "t.gif")
    assert Image.open(tmp_path / "t.gif").n_frames == 3


def test_alpha_is_kept_in_files_and_lets_the_grid_show(tmp_path):
    """A pixel of LA and RGBA: transparent, half, opaque; on a grid over its white."""
    grey = torch.tensor([[[[-1.0, -1.0, -1.0]], [[-1.0, 0.0, 1.0]]]]).reshape(1, 2, 1, 3)
    red = torch.cat([-grey[:, :1], grey[:, :1], grey[:, :1], grey[:, 1:]], 1)
    (la,), (rgba,) = fd.to_pil(grey), fd.to_pil(red)
    assert (la.mode, rgba.mode) == ("LA", "RGBA")
    assert np.asarray(la)[0].tolist() == [[0, 0], [0, 128], [0, 255]]
    assert np.asarray(rgba)[0].tolist() == [[255, 0, 0, a] for a in (0, 128, 255)]
    for x, shown in (
        (grey, [[255, 255, 255], [127, 127, 127], [0, 0, 0]]),
        (red, [[255, 255, 255], [255, 127, 127], [255, 0, 0]]),
    ):
        images.save_folder(x, tmp_path / str(x.shape[1]), [7])
        assert np.array_equal(Image.open(tmp_path / str(x.shape[1]) / "7.png"), fd.to_pil(x)[0])
        for suffix in ("png", "jpg"):
            fd.save_grid(x, tmp_path / f"grid.{suffix}", zoom=1)
        grid = np.asarray(Image.open(tmp_path / "grid.png"))
        assert grid.shape == (5, 7, 3) and grid[2, 2:5].tolist() == shown
        assert (grid[:2] == 255).all() and (grid[:, 5:] == 255).all()


@pytest.mark.parametrize(("channels", "mode"), [(2, "LA"), (4, "RGBA"), (5, None)])
def test_the_command_writes_or_refuses_them(
    tiny_unet, tmp_path, monkeypatch, capfd, channels, mode
):
    """What is no picture is refused before the network is called."""
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    schedule = fd.NoiseSchedule.create("linear", 20)
    fd.Sampler(unet, schedule, shape=(channels, 8, 8), device="cpu").save_pretrained(tmp_path / "m")
    called = []
    monkeypatch.setattr(fd.UNet, "body", _counted(fd.UNet.body, called))
    out = tmp_path / "out"
    command = ["sample", tmp_path / "m", "--seeds", "7", "--num-steps", "2", "--out", out,
               "--device", "cpu", "--compile", "off"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["flashddpm", *map(str, command)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    if mode is None:
        error = "model_dir: draws 5 channels; pictures have 1 to 4"
        assert end.value.code == 2 and error in capfd.readouterr().err
        assert not called and not out.exists()
    else:
        assert called and Image.open(out / "7.png").mode == mode


def _counted(call, calls):
    return lambda *arguments, **options: calls.append(1) or call(*arguments, **options)


def test_more_bad_pictures_are_refused(tmp_path):
    for arguments in ({"columns": 0}, {"columns": 1.5}, {"zoom": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            fd.make_grid(torch.zeros(2, 1, 4, 4), **arguments)
    with pytest.raises(ValueError, match="seeds: some stand twice"):
        images.save_folder(torch.zeros(2, 1, 4, 4), tmp_path / "f", [7, 7])
    with pytest.raises(ValueError, match="seeds: 1 for 2 images"):
        images.save_folder(torch.zeros(2, 1, 4, 4), tmp_path / "f", [7])
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_image_is_written_whole_or_not_at_all(tmp_path, monkeypatch, broken):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, broken, full)
        images.save_folder(torch.zeros(1, 1, 4, 4), tmp_path, [7])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("x", "captions", "message"),
    [
        (torch.zeros(2, 5, 4, 4), None, "1..4"),
        (torch.zeros(2, 0, 4, 4), None, "1..4"),
        (torch.zeros(1, 4, 4), None, "must be"),
        (torch.zeros(0, 1, 4, 4), None, "no image"),
        (torch.zeros(2, 1, 4, 4), ["a"], "captions: 1 for 2"),
    ],
)
def test_bad_pictures_are_refused(x, captions, message):
    with pytest.raises(ValueError, match=message):
        fd.make_grid(x, captions=captions)
