"""The solver study: what it measures, that it goes on where it was stopped, its table and plot."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import flashddpm as fd
from flashddpm.benchmarks.studies import solver_plot, solver_study
from flashddpm.benchmarks.studies.solver_study import StudyPoint
from flashddpm.checkpoints.model_folder import save_model
from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.evaluation import distances
from flashddpm.evaluation.features import Features

PAGE = Path(__file__).parents[3] / "docs" / "evaluation.md"

WHERE = {"versions": {"torch": "2"}, "device": "cpu", "dtype": "float32"}
SETTINGS = {"model": "sha256:" + "0" * 64, "features_name": "some", "images": 100}


def result(solver, grid, steps, value):
    return {"solver": solver, "grid": grid, "steps": steps, "frechet": value}


STUDY = {
    "format": 1,
    "settings": SETTINGS,
    "environment": WHERE,
    "training": 1.5,
    "results": [
        result("euler", "karras", 5, 3.25),
        result("ddim", "trailing", 10, 4.0),
        result("ddim", "trailing", 5, 9.125),
    ],
    "left_out": [{"solver": "ddpm", "grid": "beta", "steps": 5, "reason": "has no end"}],
}


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def sampler():
    """A model that takes every x_t for the same picture, of value 0.25."""

    def network(x, t):
        return torch.full_like(x, 0.25)

    schedule = fd.NoiseSchedule.create("linear", 100)
    shape = (1, 2, 2)
    return fd.Sampler(network, schedule, shape=shape, prediction_type="sample", device="cpu")


@pytest.fixture
def extractor():
    return Features(lambda x: x.flatten(1).float(), "pixels", "sha256:p")


def test_all_combinations_with_few_steps_first():
    cases = solver_study.cases(list(SOLVERS), list(solver_plot.GRIDS), [100, 5])
    assert len(cases) == len(set(cases)) == len(SOLVERS) * 6 * 2
    assert [case.steps for case in cases] == [5] * (len(cases) // 2) + [100] * (len(cases) // 2)
    assert set(solver_plot.GRIDS) == {
        "leading", "linspace", "trailing", "karras", "exponential", "beta"
    }  # fmt: skip


@pytest.mark.parametrize("case", solver_study.cases(list(SOLVERS), list(solver_plot.GRIDS), [4]))
def test_every_case_is_a_plan_of_that_many_steps(sampler, case):
    plan = sampler.plan(**case.options)
    assert len(plan) == 4
    assert (plan.abar == sampler.plan(case.solver, 4, spacing="linspace").abar).all() == (
        case.grid == "linspace"
    )


def test_a_model_that_draws_one_picture_has_the_distance_of_its_mean(sampler, extractor):
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.normal(150.0, 3.0, (500, 4)))
    study = {"settings": {"images": 9}, "results": [], "left_out": []}
    case = StudyPoint("ddim", "trailing", 3)
    (found,) = solver_study.measure(sampler, [case], study, extractor, real)
    value = round((0.25 / 2 + 0.5) * 255)
    wanted = ((real.mean(0) - value) ** 2).sum() + torch.cov(real.T).trace()
    assert found["frechet"] == pytest.approx(float(wanted), rel=1e-6)
    assert found["seconds_to_draw"] > 0 and study["results"] == [found]
    assert {key: found[key] for key in ("solver", "grid", "steps")} == dataclasses.asdict(case)


def test_what_is_there_is_not_measured_again(sampler, extractor, monkeypatch):
    monkeypatch.setattr(distances, "frechet", lambda a, b: 7.0)
    there = result("ddim", "trailing", 3, 1.0)
    study = {"settings": {"images": 9}, "results": [there], "left_out": []}
    cases = solver_study.cases(["ddim", "ddpm"], ["trailing"], [3, 2])
    found = list(solver_study.measure(sampler, cases, study, extractor, torch.zeros(9, 4)))
    assert [(r["solver"], r["steps"]) for r in found] == [("ddim", 2), ("ddpm", 2), ("ddpm", 3)]
    assert study["results"] == [there, *found]


def test_nothing_is_begun_past_the_budget(sampler, extractor):
    study = {"settings": {"images": 9}, "results": [], "left_out": []}
    cases = solver_study.cases(["ddim"], ["trailing"], [2, 3])
    real = torch.zeros(9, 4)
    assert not list(solver_study.measure(sampler, cases, study, extractor, real, end=-1.0))
    assert not study["left_out"]


def test_a_case_without_a_plan_is_left_out_with_the_reason(extractor, monkeypatch):
    monkeypatch.setattr(distances, "frechet", lambda a, b: 7.0)
    schedule = fd.NoiseSchedule.create("linear", 100, rescale_betas_zero_snr=True)
    sampler = fd.Sampler(
        lambda x, t: x, schedule, shape=(1, 2, 2), prediction_type="v_prediction", device="cpu"
    )
    study = {"settings": {"images": 5}, "results": [], "left_out": [STUDY["left_out"][0]]}
    cases = solver_study.cases(["ddim"], ["trailing", "karras"], [2])
    found = list(solver_study.measure(sampler, cases, study, extractor, torch.zeros(5, 4)))
    assert [r["grid"] for r in found] == ["trailing"]
    assert [case["grid"] for case in study["left_out"]] == ["beta", "karras"]
    assert "zero-terminal-SNR" in study["left_out"][1]["reason"]
    left_out = list(study["left_out"])
    assert not list(solver_study.measure(sampler, cases, study, extractor, torch.zeros(5, 4)))
    assert study["left_out"] == left_out


def test_a_study_of_other_settings_is_not_gone_on_with(tmp_path):
    path = tmp_path / "study.json"
    assert solver_study.begin(path, SETTINGS)["results"] == []
    path.write_text(json.dumps(STUDY))
    assert solver_study.begin(path, SETTINGS)["results"] == STUDY["results"]
    with pytest.raises(ValueError, match="other settings: images: 100 there, 99 now"):
        solver_study.begin(path, {**SETTINGS, "images": 99})
    path.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="is no solver study"):
        solver_study.begin(path, SETTINGS)


def test_the_table_has_a_row_a_spacing_and_a_column_a_step_count():
    head, *lines = solver_plot.table(STUDY).splitlines()
    assert head.startswith("100 images a point, guidance 1, cpu, float32, torch 2; ")
    assert head.endswith("Training images, as many: 1.50.")
    assert lines[1:] == [
        "| solver | spacing | 5 steps | 10 steps |",
        "|---|---|---|---|",
        "| ddim | trailing | 9.12 | **4.00** |",
        "| euler | karras | **3.25** |  |",
        "",
        "Left out: ddpm, beta, 5 steps: has no end",
    ]


def test_the_plot_has_a_panel_a_spacing_and_a_line_a_solver(monkeypatch):
    figures = []
    monkeypatch.setattr(solver_plot, "png_of", lambda figure: figures.append(figure) or b"")
    solver_plot.plot(STUDY)
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["trailing", "karras"]
    trailing, karras = (axes.get_lines() for axes in figure.axes)
    assert trailing[0].get_xydata().tolist() == [[5, 9.125], [10, 4]]
    assert karras[0].get_xydata().tolist() == [[5, 3.25]]
    assert trailing[1].get_ydata()[0] == karras[1].get_ydata()[0] == 1.5
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["ddim", "euler"]


def test_a_page_is_filled_where_it_says_so(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "s.json").write_text(json.dumps(STUDY))
    place = "<!-- solver study: s.json -->\nold\n<!-- end of solver study -->"
    page.write_text(f"before\n{place}\nafter\n")
    text = solver_plot.filled(page)
    assert solver_plot.table(STUDY) in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    page.write_text(text)
    assert solver_plot.filled(page) == text
    page.write_text("no place")
    with pytest.raises(ValueError, match="page=.*must say <!-- solver study"):
        solver_plot.filled(page)


def test_the_page_of_this_repository_has_the_table_of_its_study():
    text = solver_plot.find_places(PAGE)
    found = solver_plot.PLACE.search(text)
    if (PAGE.parent / found[2]).exists():
        assert solver_plot.filled(PAGE) == text
    else:  # not measured yet: no table stands there either
        assert found[0] == f"{found[1]}{found[3]}"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A tiny model of 8x8 images of 2 classes, and images for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = fd.UNetConfig(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), norm_num_groups=4, layers_per_block=1,
        up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=3,
    )  # fmt: skip
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 20}
    state = fd.UNet(config).state_dict()
    save_model(tmp_path / "model", config, state, scheduler, fd.Conditioning(2, 2))
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 90), ("t10k", 70)):
        images = rng.integers(0, 256, (count, 8, 8), np.uint8)
        write_idx(data / f"{name}-images-idx3-ubyte", images)
        write_idx(data / f"{name}-labels-idx1-ubyte", (np.arange(count) % 2).astype(np.uint8))
    return tmp_path / "model", data


def command(folders, tmp_path, *more):
    line = [*folders, "--out-json", tmp_path / "s.json", "--device", "cpu", "--num-images", 66,
            "--solvers", "ddim,dpmpp_2m", "--grids", "trailing,karras", *more]  # fmt: skip
    solver_study.main([str(part) for part in line])
    return json.loads((tmp_path / "s.json").read_text())


def test_the_command_goes_on_and_fills_in_the_page(folders, tmp_path, capsys):
    first = command(folders, tmp_path, "--steps", "2")
    assert len(first["results"]) == 4 and first["training"] > 0
    page = tmp_path / "page.md"
    page.write_text("<!-- solver study: s.json -->\n<!-- end of solver study -->\n")
    capsys.readouterr()
    more = ("--steps", "2,3", "--out-png", tmp_path / "s.png", "--page", page)
    second = command(folders, tmp_path, *more)
    assert second["results"][:4] == first["results"] and len(second["results"]) == 8
    assert capsys.readouterr().out.count(" 3 steps ") == 4
    assert solver_plot.table(second) in page.read_text()
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    settings = second["settings"]
    assert settings["device"] == second["environment"]["device"] == "cpu"
    assert settings["images"] == 66 and settings["features_name"].startswith("classifier")
    with pytest.raises(SystemExit, match="error: out_json=.*images: 66 there, 67 now"):
        command(folders, tmp_path, "--steps", "2", "--num-images", 67)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num-images", 64), "num_images: 64 samples of 64 features.*at least 65"),
        (("--num-images", 91), r"num_images=91: must be in 2\.\.90"),
        (("--solvers", "heun"), "solvers='heun': must be one of ddpm"),
        (("--grids", "even"), "grids='even': must be one of leading"),
        (("--steps", "5,x"), "steps='5,x': must be integers"),
        (("--steps", "0"), "steps=0: must be at least 1"),
        (("--out-png", "a.gif"), "out_png='a.gif': must be a file that ends in .png"),
        (("--page", "missing.md"), "page='missing.md': cannot be read"),
        (("--features", "none.pt"), "none.pt: is missing"),
    ],
)
def test_refused_before_any_work(folders, tmp_path, monkeypatch, more, message):
    def never(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr(fd.Sampler, "sample", never)
    monkeypatch.setattr("flashddpm.evaluation.job.classifier_for", never)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(folders, tmp_path, *more)
