"""denoising-diffusion-pytorch's checkpoints, against what its own code gave and gives."""

import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import flashddpm as fd
from flashddpm.convert import convert, lucidrains
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.errors import CheckpointError
from flashddpm.networks.rms_unet import RMSUNet, RMSUNetConfig

FIXTURES = Path(__file__).parent / "fixtures"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_ddpt, make_openai = script("make_ddpt"), script("make_openai")
with safe_open(FIXTURES / "ddpt.safetensors", "pt") as file:
    STORED = {key: file.get_tensor(key) for key in file.keys()}
    SHAPES = {key: json.loads(value) for key, value in file.metadata().items()}

THETA = {"default": 10000.0, "other": 500.0}
TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "dim": 8,
    "dims": [8, 8, 12],
    "full_attention": [False, True],
    "attention_heads": [1, 2],
    "attention_head_dim": [4, 4],
}


def state_of(name: str, prefix: str = "model.", tables: str | None = None) -> dict[str, Tensor]:
    state = {prefix + k: v for k, v in make_openai.weights(SHAPES[name]).items()}
    if tables is not None:
        above = prefix.removesuffix("model.")
        state[above + "betas"] = STORED["betas." + tables.split(".")[0]]
        state[above + "loss_weight"] = STORED["loss_weight." + tables]
    return state


def flags(**given: Any) -> lucidrains.LucidrainsFlags:
    return lucidrains.LucidrainsFlags(**{"image_size": 16, **given})


def network(name: str, state: dict[str, Tensor] | None = None, **given: Any) -> RMSUNet:
    config, weights, _ = lucidrains.convert(
        state or state_of(name), flags(sinusoidal_pos_emb_theta=THETA[name], **given)
    )
    unet = RMSUNet(config).eval()
    unet.load_state_dict(weights)
    return unet


@pytest.mark.parametrize("name", make_ddpt.UNETS)
def test_our_network_gives_their_output(name: str) -> None:
    expected = STORED[f"{name}.out"]
    with torch.no_grad():
        out = network(name, objective="pred_noise")(STORED[f"{name}.x"], STORED[f"{name}.t"])
    assert float(expected.std()) > 0.1
    assert float((out - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_settings_follow_from_the_weights() -> None:
    assert network("default").config == RMSUNetConfig(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        dim=16,
        dims=(16, 16, 32, 64),
        full_attention=(False, False, True),
        attention_heads=(4, 4, 4),
        attention_head_dim=(32, 32, 32),
    )
    assert network("other", objective="pred_noise").config == RMSUNetConfig(
        sample_size=16,
        in_channels=1,
        out_channels=2,
        dim=12,
        dims=(10, 12, 36),
        full_attention=(True, False),
        attention_heads=(2, 3),
        attention_head_dim=(8, 16),
        theta=500.0,
    )


@pytest.mark.parametrize("schedule", make_ddpt.SCHEDULES)
def test_schedules_are_theirs(schedule: str) -> None:
    stored = STORED[f"betas.{schedule}"].numpy()
    for table in (None, f"{schedule}.pred_v.plain"):
        _, _, config = lucidrains.convert(
            state_of("default", tables=table),
            flags(beta_schedule=schedule, timesteps=make_ddpt.T),
        )
        betas = NoiseSchedule.from_config(config).betas
        np.testing.assert_allclose(betas.astype(np.float32), stored, rtol=3e-7)
        assert np.any(betas.astype(np.float32) != betas)  # float64, not their rounded table


@pytest.mark.parametrize(
    ("schedule", "objective", "kind"),
    list(itertools.product(make_ddpt.SCHEDULES, make_ddpt.OBJECTIVES, ("plain", "bounded"))),
)
def test_the_tables_tell_schedule_and_objective(schedule: str, objective: str, kind: str) -> None:
    state = state_of("default", tables=f"{schedule}.{objective}.{kind}")
    _, _, config = lucidrains.convert(state, flags())
    named = lucidrains.schedule_config(schedule, make_ddpt.T)
    assert {key: config[key] for key in named} == named
    assert config["prediction_type"] == lucidrains.OBJECTIVES[objective]
    assert config["num_train_timesteps"] == make_ddpt.T
    for other in set(make_ddpt.OBJECTIVES) - {objective}:
        with pytest.raises(ValueError, match=f"objective='{other}': must be {objective}"):
            lucidrains.convert(state, flags(objective=other))
    for other in set(make_ddpt.SCHEDULES) - {schedule}:
        with pytest.raises(ValueError, match=f"beta_schedule='{other}': must be another"):
            lucidrains.convert(state, flags(beta_schedule=other))


def test_a_schedule_of_their_own_is_kept() -> None:
    state = state_of("default", tables="linear.pred_x0.plain")
    state["betas"] = torch.linspace(1e-3, 3e-2, make_ddpt.T)
    state["loss_weight"] = torch.ones(make_ddpt.T)
    _, _, config = lucidrains.convert(state, flags())
    assert config["trained_betas"] == state["betas"].double().tolist()
    assert config["prediction_type"] == "epsilon"
    state["loss_weight"] = torch.full((make_ddpt.T,), 7.0)
    with pytest.raises(ValueError, match="objective=None: must be given"):
        lucidrains.convert(state, flags())
    assert lucidrains.convert(state, flags(objective="pred_x0"))[2]["prediction_type"] == "sample"


def test_defaults_without_tables_are_theirs() -> None:
    _, _, config = lucidrains.convert(state_of("default", prefix=""), flags())
    assert (config["num_train_timesteps"], config["prediction_type"]) == (1000, "v_prediction")
    assert config["variance_type"] == "fixed_small"
    betas = lucidrains.sigmoid_betas(1000).tolist()
    assert config["trained_betas"] == betas
    _, _, config = lucidrains.convert(state_of("other"), flags(objective="pred_noise"))
    assert config["variance_type"] == "learned_range"


def test_of_a_trainers_file_the_average_is_taken() -> None:
    online = state_of("default", "model.model.", "linear.pred_x0.plain")
    twin = state_of("default", "ema.online_model.model.", "linear.pred_x0.plain")
    average = state_of("default", "ema.ema_model.model.", "linear.pred_x0.plain")
    average = {key: value * 0.5 if "conv" in key else value for key, value in average.items()}
    state = {**online, **twin, **average, "ema.step": torch.tensor(1), "step": torch.tensor(1)}
    for weights, prefix in ((None, "ema.ema_model.model."), ("online", "model.model.")):
        config, taken, scheduler = lucidrains.convert(state, flags(weights=weights))
        assert scheduler["prediction_type"] == "sample"
        assert all(torch.equal(value, state[prefix + key]) for key, value in taken.items())
        assert taken.keys() == RMSUNet(config).state_dict().keys()
    with pytest.raises(CheckpointError, match="weights=ema: 0 such networks.*must be one"):
        lucidrains.convert(online, flags(weights="ema"))
    with pytest.raises(CheckpointError, match=r"weights=online: 0 .*no init_conv\.weight"):
        lucidrains.convert({}, flags())


def test_a_trainers_pickle_is_read(tmp_path: Path) -> None:
    state = state_of("default", tables="linear.pred_x0.plain")
    average = {"ema_model." + key: value.clone() for key, value in state.items()}
    average["ema_model.model.final_conv.bias"] += 1
    ema = {"initted": torch.tensor(True), "step": torch.tensor(4), **average}
    ema |= {"online_model." + key: value for key, value in state.items()}
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], 1e-4, (0.9, 0.99))
    weight.sum().backward()
    optimizer.step()
    trained = {"step": 5, "model": state, "opt": optimizer.state_dict(), "ema": ema}
    trained |= {"scaler": None, "version": "2.3.4"}
    path = tmp_path / "model-1.pt"
    torch.save(trained, path)
    convert(path, tmp_path / "out", "ddpt", True, image_size=16)
    bias = fd.Sampler.from_pretrained(tmp_path / "out").network.final_conv.bias
    assert torch.equal(bias, state["model.final_conv.bias"] + 1)

    shared = {"a": state}
    torch.save({**trained, "x": shared, "y": shared}, path)
    with pytest.raises(CheckpointError, match="has one in two places"):
        convert(path, tmp_path / "out", "ddpt", True, image_size=16)
    for _ in range(9):
        shared = {"a": shared}
    torch.save({**trained, "x": shared}, path)
    with pytest.raises(CheckpointError, match="nests dicts more than 8 deep"):
        convert(path, tmp_path / "out", "ddpt", True, image_size=16)


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return {**state_of("default", ""), **{k.replace("__", "."): v for k, v in tensors.items()}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(init_conv__weight=torch.zeros(16, 6, 7, 7)), "self-conditioning"),
        (changed(time_mlp__0__weights=torch.zeros(8)), "learned or random sinusoids"),
        (changed(final_conv__bias=torch.zeros(2)), r"final_conv.bias has shape \(2,\), must be"),
        (changed(extra=torch.zeros(2)), "extra is not expected"),
        (changed(downs__0__2__mem_kv=torch.zeros(2)), "mem_kv has shape"),
        (changed(mid_block1__block1__proj__weight=torch.zeros(1)), "not a Unet of denoising"),
        (changed(final_conv__bias=torch.full((3,), math.inf)), "not finite"),
        ({"init_conv.weight": torch.zeros(4, 3, 7, 7)}, "mid_block1.*is missing"),
    ],
)
def test_refuses_other_networks(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        lucidrains.convert(state, flags())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"timesteps": 0}, "timesteps=0"),
        ({"timesteps": 100}, "timesteps=100: must be 200, as the file says"),
        ({"beta_schedule": "log"}, "beta_schedule='log': must be one of linear, cosine, sigmoid"),
        ({"objective": "epsilon"}, "objective='epsilon': must be one of pred_noise"),
        ({"weights": "best"}, "weights='best': must be one of ema, online"),
        ({"sinusoidal_pos_emb_theta": 0.5}, "theta=0.5"),
    ],
)
def test_refuses_flags(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lucidrains.convert(state_of("default", tables="linear.pred_v.plain"), flags(**given))


def test_refuses_a_learned_variance_beside_another_objective() -> None:
    with pytest.raises(ValueError, match="objective='pred_v': must be pred_noise"):
        lucidrains.convert(state_of("other"), flags(objective="pred_v"))


def test_a_folder_holds_it_and_samples(tmp_path: Path) -> None:
    tables = "cosine.pred_v.plain"
    save_file(state_of("default", tables=tables), tmp_path / "model.safetensors")
    said = convert(tmp_path / "model.safetensors", tmp_path / "out", "ddpt", image_size=16)
    assert "200 timesteps (squaredcos_cap_v2), v_prediction, fixed_small" in said
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["unet"] == ["flashddpm", "RMSUNet"]
    sampler = fd.Sampler.from_pretrained(tmp_path / "out")
    assert isinstance(sampler.network, RMSUNet)
    assert sampler.shape == (3, 16, 16)
    with torch.no_grad():
        out = sampler.network(STORED["default.x"], STORED["default.t"])
    expected = STORED["default.out"]
    assert float((out - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    images = sampler.sample([1, 2], num_steps=3)
    assert bool(images.isfinite().all()) and not torch.equal(images[0], images[1])

    assert isinstance(fd.load_unet(tmp_path / "out"), RMSUNet)
    sampler.save_pretrained(tmp_path / "again")
    again = fd.Sampler.from_pretrained(tmp_path / "again")
    assert torch.equal(again.sample([1, 2], num_steps=3), images)


def tiny(**change: Any) -> RMSUNet:
    unet = RMSUNet(RMSUNetConfig.from_dict({**TINY, **change})).eval()
    weights = make_openai.weights({k: list(v.shape) for k, v in unet.state_dict().items()})
    unet.load_state_dict(weights)
    return unet


def test_gradients_reach_every_parameter() -> None:
    unet = tiny(dropout=0.1).train()
    unet(torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)), 5).sum().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_a_config_goes_through_its_dict() -> None:
    config = RMSUNetConfig.from_dict({**TINY, "sample_size": [8, 4], "theta": 500})
    assert RMSUNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4}, "heads=4: unknown key"),
        ({"sample_size": [8, 8, 8]}, "sample_size="),
        ({"sample_size": "8"}, "sample_size='8'"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"dim": 7}, "dim=7: must be even"),
        ({"dim": 2}, "dim=2"),
        ({"dims": [8]}, r"dims=\[8\]: must be a list of 2..11"),
        ({"dims": [8, 8, True]}, "dims=True"),
        ({"dims": 8}, "dims=8"),
        ({"full_attention": [False]}, r"full_attention=\[False\]: must have 2 entries"),
        ({"full_attention": [0, 1]}, "full_attention=0"),
        ({"attention_heads": [0, 1]}, "attention_heads=0"),
        ({"attention_head_dim": None}, "attention_head_dim=None"),
        ({"num_mem_kv": 0}, "num_mem_kv=0"),
        ({"theta": math.nan}, "theta=nan"),
        ({"dropout": -1}, "dropout=-1"),
    ],
)
def test_refuses_a_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        RMSUNetConfig.from_dict({**TINY, **change})


def test_refuses_a_config_with_a_hole() -> None:
    with pytest.raises(ValueError, match="dims: is missing"):
        RMSUNetConfig.from_dict({key: value for key, value in TINY.items() if key != "dims"})


def test_refuses_inputs() -> None:
    unet, x = tiny(), torch.zeros(2, 3, 4, 6)
    for args, message in (
        ((x[:, :1], 5), r"x_t of shape \(2, 1, 4, 6\): must be \[B, 3, H, W\]"),
        ((x[:, :, :3], 5), r"x_t of shape \(2, 3, 3, 6\).*multiples of 2"),
        ((x, torch.arange(3)), r"t of shape \(3,\): must be one or \[2\]"),
        ((x, 5, torch.zeros(2).long()), "labels: given, but this network is unconditional"),
    ):
        with pytest.raises(ValueError, match=message):
            unet(*args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_its_weights_dtype(dtype: torch.dtype) -> None:
    unet = tiny()
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = unet(x, 5)
        out = unet.to(dtype)(x.to(dtype), 5)
    assert out.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float64 else 0.1
    assert float((out - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_their_package_called_directly(tmp_path: Path) -> None:
    import denoising_diffusion_pytorch as theirs

    torch.manual_seed(0)
    unet = theirs.Unet(8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=4)
    diffusion = theirs.GaussianDiffusion(unet, image_size=8, timesteps=50, objective="pred_noise")
    state = {key: value.clone() for key, value in diffusion.eval().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "out", "ddpt", image_size=8)
    sampler = fd.Sampler.from_pretrained(tmp_path / "out")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([30, 30])
    with torch.no_grad():
        expected, out = unet(x, t), sampler.network(x, t)
        mean, variance, _, _ = diffusion.p_mean_variance(x, t, clip_denoised=True)
    assert float((out - expected).abs().max()) <= 1e-5 * float(expected.abs().max())

    # One step of theirs is one row of ours.
    schedule = sampler.schedule
    a = math.sqrt(schedule.alphas_cumprod[30])
    x0 = ((x - math.sqrt(1 - a * a) * out) / a).clamp(-1, 1)
    ours = schedule.posterior_mean_coef_x0[30] * x0 + schedule.posterior_mean_coef_xt[30] * x
    torch.testing.assert_close(ours.float(), mean, rtol=1e-5, atol=1e-5)
    assert math.isclose(schedule.posterior_variance[30], float(variance[0]), rel_tol=1e-5)
    assert sampler.plan("ddpm", 50).timesteps.tolist() == list(range(49, -1, -1))
