"""improved-diffusion's and guided-diffusion's checkpoints, against what their own code gave."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import flashddpm as fd
from flashddpm.cli import convert as cli_convert
from flashddpm.convert import convert, openai, openai_flags
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.timesteps import respaced, timesteps
from flashddpm.errors import CheckpointError
from flashddpm.networks.unet import UNet

FIXTURES = Path(__file__).parent / "fixtures"
SPEC = importlib.util.spec_from_file_location("make_openai", FIXTURES / "make_openai.py")
assert SPEC is not None and SPEC.loader is not None
make_openai = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_openai)

CASES: dict[str, dict[str, Any]] = make_openai.CASES
DIFFUSERS = ("improved_scale_shift", "guided_updown", "guided_legacy")  # which it can express
SMALL = "improved_scale_shift"

_states: dict[str, dict[str, Tensor]] = {}


def tables(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(FIXTURES / f"openai_{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def state_of(name: str) -> dict[str, Tensor]:
    """Their state dict; not to be changed."""
    if name not in _states:
        _states[name] = make_openai.weights(json.loads(tables(name)[1]["shapes"]))
    return dict(_states[name])


def flags_of(name: str, **change: Any) -> openai_flags.OpenAIFlags:
    return openai_flags.OpenAIFlags(project=name.split("_")[0], **{**CASES[name], **change})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case, converted."""
    root = tmp_path_factory.mktemp("converted")
    for name, flags in CASES.items():
        save_file(state_of(name), root / f"{name}.safetensors")
        convert(root / f"{name}.safetensors", root / name, name.split("_")[0], **flags)
    return {name: root / name for name in CASES}


def difference(out: Tensor, case: dict[str, Tensor]) -> float:
    """The largest difference from their output, relative to its largest number."""
    expected = case["out"]
    if out.shape != expected.shape:  # of a large image a part is kept
        out = out[:, :, ::4, ::4]
    assert out.shape == expected.shape
    assert float(expected.std()) > 0.3
    return float((out - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_our_network_gives_their_output(name: str, folders: dict[str, Path]) -> None:
    case, _ = tables(name)
    unet = fd.load_unet(folders[name])
    out = unet(case["x"], case["t"], case.get("y"))
    assert difference(out, case) <= 1e-5


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_network_gives_their_output_too(name: str, folders: dict[str, Path]) -> None:
    import diffusers

    case, _ = tables(name)
    theirs = diffusers.UNet2DModel.from_pretrained(folders[name] / "unet").eval()
    with torch.no_grad():
        out = theirs(case["x"], case["t"], case.get("y")).sample
    assert difference(out, case) <= 1e-5


def test_settings_follow_from_the_weights() -> None:
    found = {name: openai.read_layout(state_of(name)) for name in CASES}
    assert [found[name].channels for name in CASES] == [
        (32, 64, 64, 64),
        (32, 64, 96, 128),
        (32, 64, 96, 128),
        (64, 64, 128, 192, 256),
        (32, 64, 64, 128, 128, 256, 256),
    ]
    assert [found[name].attention.index(True) for name in CASES] == [1, 2, 1, 2, 5]
    assert [sum(found[name].attention) for name in CASES] == [2, 2, 3, 2, 2]
    assert [found[name].num_res_blocks for name in CASES] == [1, 1, 2, 1, 1]
    assert [found[name].num_channels for name in CASES] == [32, 32, 32, 64, 64]
    assert [found[name].num_classes for name in CASES] == [None, None, 1000, None, None]
    assert [found[name].out_channels for name in CASES] == [6, 3, 6, 3, 3]
    assert [found[name].scale_shift for name in CASES] == [True, False, True, False, True]
    assert [found[name].updown for name in CASES] == [False, False, True, True, False]


def output_with(name: str, **change: Any) -> float:
    case, _ = tables(name)
    config, state, _ = openai_flags.convert(state_of(name), flags_of(name, **change))
    unet = UNet(config).eval()
    unet.load_state_dict(state)
    with torch.no_grad():
        return difference(unet(case["x"], case["t"], case.get("y")), case)


def test_what_the_weights_do_not_say_matters() -> None:
    """So the fixtures can tell one order of q, k, v from the other, and heads from heads."""
    assert output_with("guided_updown", use_new_attention_order=False) > 1e-3
    assert output_with(SMALL, use_new_attention_order=True) > 1e-3
    assert output_with(SMALL, num_heads=2) > 1e-3
    assert output_with("guided_legacy", num_head_channels=32) > 1e-3
    assert output_with("improved_rescaled", rescale_timesteps=False) > 1e-3


def test_the_network_is_told_their_timesteps(folders: dict[str, Path]) -> None:
    case, _ = tables("improved_rescaled")
    assert case["told"].tolist() == [999.5, 0.75]
    config = fd.load_unet(folders["improved_rescaled"]).config
    assert (config.time_embedding_type, config.num_train_timesteps) == ("rescaled", 4000)
    # With T = 1000 nothing is rescaled, whatever the flag says.
    config, _, _ = openai_flags.convert(state_of(SMALL), flags_of(SMALL, rescale_timesteps=True))
    assert config.time_embedding_type == "positional"


def test_schedules_are_theirs() -> None:
    stored, _ = tables("tables")
    for kind, T in (("linear", 1000), ("linear", 250), ("cosine", 400)):
        flags = flags_of(SMALL, noise_schedule=kind, diffusion_steps=T)
        betas = NoiseSchedule.from_config(flags.scheduler(False)).betas
        np.testing.assert_allclose(betas, stored[f"betas.{kind}.{T}"].numpy(), rtol=1e-12)


def test_a_folder_says_how_it_is_sampled(folders: dict[str, Path]) -> None:
    samplers = {name: fd.Sampler.from_pretrained(folders[name]) for name in CASES}
    said = {name: (s.prediction_type, s.defaults.variance_type) for name, s in samplers.items()}
    assert said["improved_scale_shift"] == ("epsilon", "learned_range")
    assert said["improved_rescaled"] == ("epsilon", "fixed_large")
    assert said["guided_legacy"] == ("sample", "fixed_large")
    assert {s.defaults.spacing for s in samplers.values()} == {"linspace"}
    assert flags_of(SMALL, sigma_small=True).scheduler(False)["variance_type"] == "fixed_small"
    assert samplers["guided_updown"].conditioning.num_classes == 1000
    assert samplers["guided_halved"].shape == (3, 512, 512)


def test_a_converted_model_samples(tmp_path: Path) -> None:
    name = "guided_updown"
    save_file(state_of(name), tmp_path / "model.safetensors")
    convert(
        tmp_path / "model.safetensors",
        tmp_path / "model",
        "guided",
        image_size=8,
        num_head_channels=32,
        use_new_attention_order=True,
    )
    sampler = fd.Sampler.from_pretrained(tmp_path / "model")
    images = sampler.sample([3, 4], [0, 999], solver="ddpm", num_steps=2)
    assert tuple(images.shape) == (2, 3, 8, 8)
    assert bool(images.isfinite().all())
    assert not torch.equal(images[0], images[1])


def test_respacings_are_theirs() -> None:
    stored, _ = tables("tables")
    seen = 0
    for key, steps in stored.items():
        kind, T, *text = key.split(".")
        if kind == "steps":
            assert respaced(text[0], int(T)).tolist() == steps.tolist()[::-1], key
            seen += 1
    assert seen == sum(map(len, make_openai.RESPACINGS.values()))


@pytest.mark.parametrize(
    ("text", "T", "message"),
    [
        ("ddim", 1000, "must be a number of steps, several"),
        ("ddim5,5", 1000, "must be a number of steps"),
        ("ddim0", 1000, "must be a number of steps"),
        ("5,", 1000, "must be a number of steps"),
        ("-5", 1000, "must be a number of steps"),
        ("0", 1000, "must be a number of steps"),
        ("fast", 1000, "must be a number of steps"),
        (50, 1000, "must be a number of steps"),
        ("ddim600", 1000, "no stride takes 600 of 1000 timesteps; must be ddim500, say"),
        ("ddim1001", 1000, "no stride takes 1001 of 1000 timesteps; must be ddim1000, say"),
        ("1001", 1000, "1001 timesteps do not fit in section 1, which has 1000"),
        ("4,4,3", 10, "4 timesteps do not fit in section 2, which has 3"),
    ],
)
def test_refuses_a_respacing(text: Any, T: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"timestep_respacing=.*{message}"):
        respaced(text, T)


def test_a_respacing_becomes_a_spacing() -> None:
    for text, spacing in (("250", "linspace"), ("ddim50", "leading"), ("", "linspace")):
        flags = flags_of(SMALL, timestep_respacing=text)
        assert flags.scheduler(True)["timestep_spacing"] == spacing
        n = len(respaced(text))
        assert respaced(text).tolist() == timesteps(n, 1000, spacing).tolist()
    with pytest.raises(ValueError, match="timestep_respacing='10,20,30'.*no spacing.*respaced"):
        flags_of(SMALL, timestep_respacing="10,20,30").scheduler(True)


FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"image_size": 0}, "image_size=0"),
    ({"num_heads": 0}, "num_heads=0"),
    ({"num_heads": 3}, "num_heads=3: must divide a level's 64 channels"),
    ({"num_head_channels": 48}, "num_head_channels=48: must divide a level's 64 channels"),
    ({"num_head_channels": 0}, "num_head_channels=0"),
    ({"num_heads_upsample": 2}, "num_heads_upsample=2: must be -1 or num_heads=4"),
    ({"diffusion_steps": 0}, "diffusion_steps=0"),
    ({"diffusion_steps": 10}, "beta_end"),
    ({"noise_schedule": "sigmoid"}, "noise_schedule='sigmoid': must be one of linear, cosine"),
    ({"num_channels": 64}, "num_channels=64: must be 32, as the weights say"),
    ({"num_res_blocks": 2}, "num_res_blocks=2: must be 1"),
    ({"class_cond": True}, "class_cond=True: must be False"),
    ({"learn_sigma": False}, "learn_sigma=False: must be True"),
    ({"use_scale_shift_norm": False}, "use_scale_shift_norm=False: must be True"),
    ({"resblock_updown": True}, "resblock_updown=True: must be False"),
    ({"channel_mult": "1,2,3,4"}, "channel_mult='1,2,3,4': must give the channels 32,64,64,64"),
    ({"channel_mult": "1;2"}, "channel_mult='1;2': must be numbers"),
    ({"attention_resolutions": "16"}, "attention_resolutions='16': must name .* just 16,8"),
    ({"attention_resolutions": "8,16,32"}, "attention_resolutions='8,16,32'"),
    ({"attention_resolutions": "0,a"}, "attention_resolutions='0,a': must be numbers"),
    ({"dropout": 2.0}, "dropout=2"),
]


@pytest.mark.parametrize(("change", "message"), FLAGS)
def test_refuses_flags(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        openai_flags.convert(state_of(SMALL), flags_of(SMALL, **change))


def test_accepts_flags_that_the_weights_confirm() -> None:
    confirmed = {"channel_mult": "1,2,2,2", "class_cond": False, "use_scale_shift_norm": True}
    config, _, _ = openai_flags.convert(state_of(SMALL), flags_of(SMALL, **confirmed))
    assert config == openai_flags.convert(state_of(SMALL), flags_of(SMALL))[0]


def refused(state: dict[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        openai_flags.convert(state, flags_of(SMALL))
    return str(caught.value)


def test_names_every_tensor_out_of_place() -> None:
    state = state_of(SMALL)
    del state["middle_block.1.norm.weight"]
    state["out.2.bias"] = torch.zeros(5)
    assert refused(state) == (
        "mid_block.attentions.0.group_norm.weight is missing; "
        "conv_out.bias has shape (5,), must be (6,)"
    )
    state = {**state_of(SMALL), "ema.decay": torch.zeros(()), "more": torch.zeros(2)}
    assert refused(state) == "ema.decay is not expected; more is not expected"
    state = {**state_of(SMALL), "out.2.bias": torch.full((6,), torch.nan)}
    assert "conv_out.bias holds numbers that are not finite" in refused(state)


def test_refuses_other_networks() -> None:
    assert "not a U-Net of improved-diffusion" in refused({})
    classifier = {k: v for k, v in state_of(SMALL).items() if not k.startswith("output_blocks")}
    assert "not a U-Net of improved-diffusion" in refused(classifier)
    state = {**state_of(SMALL), "input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}
    with pytest.raises(ValueError, match="takes 6 channels and gives 6.*super-resolution"):
        openai_flags.convert(state, flags_of(SMALL))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_damage_is_refused(data: st.DataObject) -> None:
    state = state_of(SMALL)
    key = data.draw(st.sampled_from(sorted(state)))
    kind = data.draw(st.sampled_from(["gone", "renamed", "shape", "flat"]))
    value = state.pop(key)
    if kind == "renamed":
        state[key.replace("0", "9") if "0" in key else key + "_"] = value
    elif kind == "shape":
        shape = [side + data.draw(st.integers(0, 2)) for side in value.shape]
        shape[-1] += 1
        state[key] = torch.zeros(shape)
    elif kind == "flat":
        state[key] = value.reshape(-1, 1, 1, 1, 1)
    with pytest.raises(ValueError):
        openai_flags.convert(state, flags_of(SMALL))


def test_reads_pickles_only_if_asked(tmp_path: Path) -> None:
    torch.save(state_of(SMALL), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt.*--allow-pickle \(allow_pickle=True\)"):
        convert(tmp_path / "model.pt", tmp_path / "out", "improved", **CASES[SMALL])
    assert not (tmp_path / "out").exists()
    said = convert(tmp_path / "model.pt", tmp_path / "out", "improved", True, **CASES[SMALL])
    assert "1,679,782 parameters, 1000 timesteps (linear), epsilon, learned_range" in said
    assert "image_size=32, num_heads=4, use_new_attention_order=False" in said
    with pytest.raises(CheckpointError, match="no.safetensors: is missing"):
        convert(tmp_path / "no.safetensors", tmp_path / "out", "improved", **CASES[SMALL])


def test_reads_weights_that_mixed_precision_saves(tmp_path: Path) -> None:
    """Their fp16 training keeps all weights of a rank in one tensor, and saves views of it."""
    state = state_of(SMALL)
    for vectors in (False, True):
        group = {key: value for key, value in state.items() if (value.ndim == 1) == vectors}
        whole = torch.cat([value.flatten() for value in group.values()])
        parts = whole.split([value.numel() for value in group.values()])
        for (key, value), part in zip(group.items(), parts, strict=True):
            state[key] = part.view_as(value)
    torch.save(state, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 1.1 * sum(v.nbytes for v in state.values())
    convert(tmp_path / "model.pt", tmp_path / "out", "improved", True, **CASES[SMALL])
    case, _ = tables(SMALL)
    assert difference(fd.load_unet(tmp_path / "out")(case["x"], case["t"]), case) <= 1e-5

    del state["out.2.bias"]  # a hole in the one tensor: more was saved than is named
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="must be all of its storage"):
        convert(tmp_path / "model.pt", tmp_path / "out", "improved", True, **CASES[SMALL])


def test_refuses_arguments(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="source='openai': must be one of improved, guided, ddpt"):
        convert(path, tmp_path / "out", "openai", image_size=32)
    with pytest.raises(ValueError, match="objective='pred_v': must not be given, guided has no"):
        convert(path, tmp_path / "out", "guided", image_size=32, objective="pred_v")
    with pytest.raises(ValueError, match="image_size: must be given"):
        convert(path, tmp_path / "out", "guided")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*not a U-Net"):
        convert(path, tmp_path / "out", "guided", image_size=32)
    assert not (tmp_path / "out").exists()


def run(*args: str) -> Any:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(cli_convert.convert)
    return CliRunner().invoke(app, list(args))


def test_the_command_takes_their_flags_as_they_stand(tmp_path: Path) -> None:
    name = "guided_updown"
    save_file(state_of(name), tmp_path / "model.safetensors")
    pasted = (
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 "
        "--image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 32 "
        "--num_head_channels 32 --num_res_blocks 2 --resblock_updown True "
        "--use_new_attention_order True --use_fp16 True --use_scale_shift_norm True"
    )
    out = tmp_path / "out"
    checkpoint = str(tmp_path / "model.safetensors")
    result = run(checkpoint, str(out), "--from", "guided", *pasted.split())
    assert result.exit_code == 0, result.output
    assert "6,507,750 parameters, 1000 timesteps (squaredcos_cap_v2), epsilon" in result.output
    case, _ = tables(name)
    assert difference(fd.load_unet(out)(case["x"], case["t"], case["y"]), case) <= 1e-5
    dashed = [part.replace("_", "-") if part[0] == "-" else part for part in pasted.split()]
    assert run(checkpoint, str(out), "--from", "guided", *dashed).exit_code == 0
    wrong = run(checkpoint, str(out), "--from", "guided", "--image-size", "64", "--class-cond", "x")
    assert "class_cond='x': must be True or False" in str(wrong.exception)


def test_switches_take_the_words_that_theirs_take(tmp_path: Path) -> None:
    save_file(state_of(SMALL), tmp_path / "model.safetensors")
    start = [str(tmp_path / "model.safetensors"), str(tmp_path / "out"), "--from", "improved"]
    start += ["--image-size", "32", "--learn-sigma"]
    for word in ("True", "yes", "1", "t"):
        assert run(*start, word).exit_code == 0
    for word in ("False", "no", "0", "N"):
        assert "learn_sigma=False: must be True, as the" in str(run(*start, word).exception)
