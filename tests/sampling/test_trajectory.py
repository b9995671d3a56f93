"""A batch that is stepped by hand, saved on its way, and resumed: the same bits."""

import subprocess

import pytest
import safetensors.torch
import torch

import flashddpm as fd

ASK = {"seeds": [3, 4, 5], "labels": [0, 1, 2], "guidance": [1.0, 2.5, 1.0]}
RUNS = [
    {"solver": "ddim"},
    {"solver": "ddpm"},
    {"solver": "dpmpp_2m_sde"},
    {"solver": "ddim", "threshold": 0.9, "clip": 2.0, "guidance_rescale": 0.7},
]


@pytest.mark.parametrize("run", RUNS)
def test_steps_by_hand_are_those_of_sample(tiny_sampler, run):
    sampler = tiny_sampler()
    trajectory = sampler.trajectory(**ASK, **run, num_steps=7)
    assert (len(trajectory), trajectory.position, trajectory.done) == (7, 0, False)
    assert torch.equal(trajectory.x, sampler.initial_noise(ASK["seeds"]))
    trajectory.step()
    trajectory.step(3)
    assert trajectory.position == 4
    got = trajectory.run()
    assert trajectory.done and torch.equal(trajectory.run(), got)
    want = sampler.sample(**ASK, **run, num_steps=7)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("position", [0, 1, 4, 7])
def test_saved_and_resumed_it_ends_in_the_same_bits(tiny_sampler, tmp_path, run, position):
    """History, noise keys and all: by another sampler of the same weights."""
    whole = tiny_sampler().trajectory(**ASK, **run, num_steps=7)
    if position:
        whole.step(position)
    path = tmp_path / "state.safetensors"
    whole.save(path)
    resumed = tiny_sampler().resume(path)
    assert (resumed.position, resumed.images.seeds, resumed.done) == (
        position,
        [3, 4, 5],
        position == 7,
    )
    assert torch.equal(resumed.x, whole.x)
    assert torch.equal(resumed.run(), whole.run())


def test_resumed_in_another_process(forked, tmp_path):
    whole = fd.Sampler.from_pretrained(fd.bundled(), compile=False).trajectory(
        [7, 8], [1, 2], solver="ddpm", num_steps=4
    )
    whole.step(2)
    whole.save(tmp_path / "state.safetensors")
    code = (
        "import sys, torch, flashddpm as fd; torch.set_num_threads(int(sys.argv[3]));"
        "s = fd.Sampler.from_pretrained(fd.bundled(), compile=False);"
        "torch.save(s.resume(sys.argv[1]).run(), sys.argv[2])"
    )
    arguments = [tmp_path / "state.safetensors", tmp_path / "x.pt", str(torch.get_num_threads())]
    subprocess.run([*forked, "-c", code, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "x.pt"), whole.run())


def test_elsewhere_says_so(tiny_sampler, tmp_path, caplog):
    path = tmp_path / "state.safetensors"
    tiny_sampler().trajectory(**ASK, num_steps=3).save(path)
    with caplog.at_level("INFO", "flashddpm"):
        tiny_sampler(backend="reference").resume(path)
    assert "images agree to rounding only: backend fused -> reference" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 1, 8, 9)}, "x of shape"),
        ({"hist": torch.zeros(2, 1, 8, 8)}, "hist of shape"),
        ({"x": torch.zeros(3, 1, 8, 8).double()}, "x of torch.float64"),
        ({"seeds": torch.zeros(3)}, "seeds"),
        ({"rows": torch.zeros(7, 3)}, "rows of shape"),
        ({"guidance": torch.ones(2).double()}, "labels or guidance"),
        ({"labels": None}, "labels do not fit"),
        ({"labels": torch.tensor([0, 1, 7])}, r"labels \[0, 1, 7\]"),
        ({"labels": torch.tensor([0, 1, -1])}, r"labels \[0, 1, -1\]"),
        ({"noise_keys": torch.zeros(7)}, "noise_keys of torch.float32"),
        ({"x": None}, "'x'"),
    ],
)
def test_broken_files_are_refused(tiny_sampler, tmp_path, change, message):
    path = tmp_path / "state.safetensors"
    tiny_sampler().trajectory(**ASK, num_steps=7).save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path) | change
    tensors = {name: value for name, value in tensors.items() if value is not None}
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(fd.CheckpointError, match=message):
        tiny_sampler().resume(path)


@pytest.mark.parametrize("metadata", [None, {"format": "2"}, {"format": "1", "position": "9"}])
def test_files_of_others_are_refused(tiny_sampler, tmp_path, metadata):
    path = tmp_path / "state.safetensors"
    tiny_sampler().trajectory(**ASK, num_steps=7).save(path)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    with pytest.raises(fd.CheckpointError, match="is not a trajectory"):
        tiny_sampler().resume(path)
    with pytest.raises(fd.CheckpointError, match="is missing"):
        tiny_sampler().resume(tmp_path / "none.safetensors")


def test_non_finite_output_ends_it(tiny_sampler):
    sampler = tiny_sampler()
    trajectory = sampler.trajectory(**ASK, num_steps=7)
    trajectory.step(2)
    with torch.no_grad():
        sampler.network.conv_out.bias.fill_(torch.nan)
    with pytest.raises(fd.NonFiniteError):
        trajectory.step()


def test_guidance_needs_a_null_class(tiny_sampler, tmp_path):
    path = tmp_path / "state.safetensors"
    tiny_sampler().trajectory(**ASK, num_steps=7).save(path)
    without = tiny_sampler()
    without.executor.conditioning = fd.Conditioning(4)
    with pytest.raises(fd.CheckpointError, match="the network has no null class"):
        without.resume(path)


def test_a_network_without_a_variance_is_refused_one_that_is_learned():
    """Else the images would be drawn with another variance, and nobody told."""

    def network(x, t, labels):
        return x * 0.5

    schedule = fd.NoiseSchedule.create("linear", 50)
    sampler = fd.Sampler(network, schedule, shape=(1, 4, 4), device="cpu", call=network)
    trajectory = sampler.trajectory([1], solver="ddpm", variance_type="learned", num_steps=5)
    with pytest.raises(ValueError, match="a learned variance takes 2"):
        trajectory.step()
