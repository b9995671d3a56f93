"""flashddpm evaluate: known answers, what it says it measured, and what it refuses beforehand."""

import builtins
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashddpm as fd
from flashddpm.checkpoints.model_folder import save_model
from flashddpm.cli import main as cli
from flashddpm.cli.evaluate import samples_of, timesteps_of
from flashddpm.cli.parsing import parse_seeds
from flashddpm.data import ImageData, load_data
from flashddpm.errors import NonFiniteError
from flashddpm.evaluation import evaluate, job, report
from flashddpm.evaluation.bound import variational_bound
from flashddpm.evaluation.job import Settings, chosen, prepare

CLASSES, COPIES = 3, 5


def write_idx(folder, name, images, labels=None):
    header = b"\x00\x00\x08\x03" + np.array(images.shape, ">u4").tobytes()
    (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    if labels is not None:
        header = b"\x00\x00\x08\x01" + np.array(labels.shape, ">u4").tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def pictures_of(rng, labels):
    """8x8 images whose class shows as the brighter third of the rows."""
    images = rng.integers(0, 120, (len(labels), 8, 8), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[3 * label : 3 * label + 2] += 120
    return images


@pytest.fixture
def data(tmp_path):
    """150 training and 90 test images of 3 classes; the first 5 of both are the same."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    labels = np.arange(150, dtype=np.uint8) % CLASSES
    train, test = pictures_of(rng, labels), pictures_of(rng, labels[:90])
    train[:COPIES] = test[:COPIES]
    write_idx(folder, "train", train, labels)
    write_idx(folder, "t10k", test, labels[:90])
    return folder


@pytest.fixture
def model(tiny_unet, tmp_path):
    folder = tmp_path / "model"
    unet = tiny_unet(num_class_embeds=CLASSES + 1)
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 20}
    names = ("low", "middle", "high")
    conditioning = fd.Conditioning(CLASSES, CLASSES, names)
    save_model(folder, unet.config, unet.state_dict(), scheduler, conditioning)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settings(model, data, tmp_path):
    """Settings of a small evaluation, with changes."""

    def make(**changes) -> Settings:
        given = {
            "model": str(model), "data": data, "out": tmp_path / "out.html", "device": "cpu",
            "num_images": 72, "plan": {"solver": "ddim", "num_steps": 2},
            "guidance": 2.0, "bound_images": 6, "bound_timesteps": "4", "batch_size": 16,
        }  # fmt: skip
        given |= changes
        given["seeds"] = samples_of(given.pop("seeds", None), given.pop("num_images"))
        given["bound_timesteps"] = timesteps_of(given["bound_timesteps"])
        return Settings(**given)

    return make


@pytest.fixture
def no_work(monkeypatch):
    """Let nothing be drawn, bounded or trained."""

    def never(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr(fd.Sampler, "sample", never)
    monkeypatch.setattr(evaluate, "variational_bound", never)
    monkeypatch.setattr(job, "classifier_for", never)


@pytest.fixture
def script(tmp_path):
    """Write a TorchScript file of a function of images."""

    def write(function) -> str:
        path = tmp_path / f"{function.__class__.__name__}.pt"
        torch.jit.script(function).save(path)
        return str(path)

    return write


class Rows(torch.nn.Module):
    """Eight features: the means of the rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean([1, 3])


class Flat(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean([1, 2, 3])


def draw_test_images(monkeypatch, data):
    """Let the model draw the test images, number seed for each: they are what is asked for."""
    test = load_data(data / "t10k-images-idx3-ubyte")

    def sample(self, seeds, labels, guidance, **options):
        images, known = test.fetch(torch.tensor(list(seeds)))
        assert known.tolist() == list(labels) and guidance == 2.0
        assert (options["solver"], options["num_steps"]) == ("ddim", 2)
        return images.float() / 127.5 - 1

    monkeypatch.setattr(fd.Sampler, "sample", sample)


def test_a_model_that_draws_the_reference_is_perfect(settings, data, monkeypatch):
    draw_test_images(monkeypatch, data)
    metrics = ("frechet", "kernel", "prc", "neighbours")
    result, shown = evaluate.evaluate(prepare(settings(num_images=90, metrics=metrics)))
    assert result["frechet"]["distance"] == pytest.approx(0, abs=1e-6)
    assert result["frechet"]["training"]["distance"] > 0.01
    # No training image is in another's place: of 90 real and 90 training images some lie apart.
    assert result["prc"]["precision"] == result["prc"]["recall"] == 1
    assert result["prc"]["reference_images"] == 90
    assert min(result["prc"]["training"][key] for key in ("precision", "recall")) < 1
    assert result["kernel"]["mean"] < result["kernel"]["training"]["mean"] + 1e-3
    found = result["recognised"]
    assert found["overall"] == found["real_overall"] > 0.9
    assert found["by_class"] == found["real_by_class"] and len(found["by_class"]) == CLASSES
    assert found["class_names"] == ["low", "middle", "high"]
    assert "bound" not in result and set(shown) == {"samples", "neighbours"}


def test_a_model_that_draws_one_class_is_precise_and_recalls_little(settings, data, monkeypatch):
    test = load_data(data / "t10k-images-idx3-ubyte")

    def sample(self, seeds, *args, **options):
        return test.images[CLASSES * torch.tensor(seeds)].float() / 127.5 - 1

    monkeypatch.setattr(fd.Sampler, "sample", sample)
    result, _ = evaluate.evaluate(prepare(settings(num_images=30, metrics=("prc",))))
    assert result["prc"]["precision"] > 0.8
    assert result["prc"]["recall"] < 0.6
    assert result["prc"]["reference_images"] == 30


def test_copies_of_training_images_are_found(settings, data, monkeypatch):
    draw_test_images(monkeypatch, data)
    given = settings(num_images=30, metrics=("neighbours",), features="none.pt")  # not looked at
    result, _ = evaluate.evaluate(prepare(given))
    found = result["neighbours"]
    assert found["duplicates"] == [{"seed": i, "training_image": i} for i in range(COPIES)]
    assert found["smallest"] == 0 and found["median"] > 10
    assert [row["seed"] for row in found["shown"][:COPIES]] == list(range(COPIES))
    assert [row["training_images"][0] for row in found["shown"][:COPIES]] == list(range(COPIES))
    # Of the test images that these samples are a third of, one in eighteen is a copy.
    assert found["real"]["smallest"] == 0 and found["real"]["median"] > 10


def test_the_bound_is_that_of_a_draw_of_reference_images(settings, data):
    work = prepare(settings(metrics=("bound",)))
    result, shown = evaluate.evaluate(work)
    index = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:6].sort().values
    images, labels = load_data(data / "t10k-images-idx3-ubyte").fetch(index)
    wanted = variational_bound(work.sampler, images, labels, timesteps=4, batch_size=16).to_dict()
    assert {key: result["bound"][key] for key in wanted} == wanted
    assert result["bound"]["labels"] == "the images'"
    assert "samples" not in result and set(shown) == {"terms", "errors"}


def test_all_timesteps_and_all_images_where_there_are_few(settings):
    work = prepare(settings(bound_images=None, bound_timesteps=None, metrics=("bound",)))
    assert (work.bound_images, work.bound_timesteps) == (90, None)
    work = prepare(settings(bound_timesteps="all", metrics=("bound",)))
    assert (work.bound_images, work.bound_timesteps) == (6, None)


def test_the_command_writes_a_page_and_json_and_prints_a_table(
    monkeypatch, capfd, model, data, tmp_path
):
    out = tmp_path / "deep" / "out.html"
    line = ["evaluate", model, data, "--num-images", 72, "--seeds", 5, "--guidance", 2.5,
            "--solver", "dpmpp_2m", "--num-steps", 3, "--sigmas", "karras", "--bound-images", 4,
            "--bound-timesteps", 3, "--device", "cpu", "--out", out]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["flashddpm", *map(str, line)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capfd.readouterr().out
    assert not end.value.code, printed
    result = json.loads(out.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    samples = result["samples"]
    wanted = {
        "count": 72, "seeds": "5:77", "labels": "in turn", "guidance": 2.5, "solver": "dpmpp_2m",
        "num_steps": 3, "sigmas": "karras",
    }  # fmt: skip
    assert samples | wanted == samples
    assert result["reference"]["held_out"] and result["reference"]["images"] == 90
    assert result["data"]["images"] == 150 and result["bound"]["images"] == 4
    prints = [result[key]["fingerprint"] for key in ("model", "data", "reference", "features")]
    assert all(p.startswith("sha256:") for p in prints) and len(set(prints)) == 4
    assert result["environment"]["versions"]["torch"] in torch.__version__
    text = out.read_text()
    for fact in (*prints, "5:77", "dpmpp_2m", "karras", "classifier trained on the data"):
        assert fact in text
    assert text.count("data:image/png;base64,") == 4
    assert "Frechet distance" in printed and "bits a dimension" in printed
    assert printed.rstrip().endswith(f"-> {out}, {out.with_suffix('.json')}")
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.html", "out.json"]


def test_samples_are_those_of_one_call(settings, monkeypatch):
    work = prepare(settings(metrics=("neighbours",)))
    sampler, seeds, labels = work.sampler, work.seeds[:20], work.labels[:20]
    whole = fd.to_uint8(sampler.sample(seeds, labels, 2.0, num_steps=2, batch_size=4))
    monkeypatch.setattr(evaluate, "PART", 9)  # two batches of four at a time
    counts, real = [], fd.Sampler.sample
    monkeypatch.setattr(
        fd.Sampler, "sample", lambda *args, **kw: counts.append(len(args[1])) or real(*args, **kw)
    )
    parts = evaluate.draw(sampler, seeds, labels, 4, False, guidance=2.0, num_steps=2)
    assert torch.equal(parts, whole)
    assert counts == [8, 8, 4]


def test_without_test_images_training_images_are_the_reference(settings, data):
    for path in data.glob("t10k*"):
        path.unlink()
    result, _ = evaluate.evaluate(prepare(settings(metrics=("frechet", "prc", "neighbours"))))
    assert not result["reference"]["held_out"]
    assert result["frechet"]["training"] is None and result["prc"]["training"] is None
    assert result["neighbours"]["real"] is None
    assert "no others were given" in report.text(result)


def test_training_images_are_not_held_out_by_another_name(settings, data):
    work = prepare(settings(reference=data / "train-images-idx3-ubyte", metrics=("prc",)))
    assert len(work.reference) == 150 and not work.held_out


def test_a_reference_may_be_named(settings, data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_idx(other, "train", np.random.default_rng(1).integers(0, 256, (80, 8, 8), np.uint8))
    work = prepare(settings(reference=other, metrics=("bound", "frechet")))
    assert len(work.reference) == 80 and work.held_out
    result, _ = evaluate.evaluate(work)
    assert result["bound"]["labels"] == "none"  # it has none: the null class
    assert "real_overall" not in result["recognised"]
    assert "recognised as asked" in report.text(result)


@pytest.mark.parametrize(("kind", "scale"), [("uint8", 1.0), ("float", 127.5)])
def test_features_of_a_file(settings, script, data, monkeypatch, kind, scale):
    draw_test_images(monkeypatch, data)
    path = script(Rows())
    given = settings(features=path, feature_input=kind, metrics=("frechet",), num_images=45)
    result, _ = evaluate.evaluate(prepare(given))
    real = load_data(data / "t10k-images-idx3-ubyte").images.double().mean([1, 3]).numpy()
    means = real[:45].mean(0) - real.mean(0)
    a, b = np.cov(real[:45].T), np.cov(real.T)
    cross = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None)).sum()
    wanted = means @ means + np.trace(a) + np.trace(b) - 2 * cross
    assert result["frechet"]["distance"] == pytest.approx(wanted / scale**2, rel=1e-4)
    assert result["features"]["name"] == "Rows.pt"
    assert "recognised" not in result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("frechet", "fid")}, "metrics='fid': must be one of bound, frechet"),
        ({"metrics": ()}, r"metrics=\[\]: must be at least one of bound"),
        ({"num_images": 64}, "num_images: 64 samples of 64 features.* at least 65"),
        ({"num_images": 1, "metrics": ("kernel",)}, "num_images: 1 samples; subsets.* least 2"),
        ({"num_images": 3, "metrics": ("prc",)}, "num_images: 3 samples.* at least 4"),
        ({"num_images": 0}, "num_images=0: must be at least 1"),
        ({"seeds": "a"}, "seeds='a'"),
        ({"bound_images": 91}, r"bound_images=91: must be in 2\.\.90"),
        ({"bound_images": 1}, "bound_images=1"),
        ({"bound_timesteps": "21"}, r"bound_timesteps=21: must be in 2\.\.20"),
        ({"bound_timesteps": "many"}, "bound_timesteps='many': must be a number or all"),
        ({"plan": {"solver": "heun"}}, "solver='heun'"),
        ({"plan": {"num_steps": 21}}, "num_steps=21"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"features": "missing.pt"}, "missing.pt: is missing"),
        ({"feature_input": "float"}, "feature_input: must be given with a TorchScript file"),
        ({"feature_input": "int"}, "feature_input='int': must be one of uint8, float"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"model": "missing"}, "missing: no such folder"),
    ],
)
def test_refused_before_any_work(settings, no_work, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(settings(**changes))


def test_labels_that_the_model_does_not_know_are_refused(settings, no_work, data):
    labels = np.full(90, CLASSES, np.uint8)
    write_idx(data, "t10k", np.zeros((90, 8, 8), np.uint8), labels)
    with pytest.raises(ValueError, match=r"reference: has labels up to 3; must be in 0\.\.2"):
        prepare(settings())


def test_no_labels_for_a_model_without_a_null_class(settings, no_work, model, data):
    config = {"num_classes": CLASSES + 1, "null_label": None}
    (model / "flashddpm.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="labels=None: this model has no null class"):
        prepare(settings(guidance=1.0))


def test_a_place_that_cannot_be_written_is_refused(settings, no_work, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "out.txt", tmp_path / "file" / "out.html"):
        with pytest.raises(ValueError, match="out="):
            prepare(dataclasses.replace(settings(), out=out))


def test_images_of_another_shape_are_refused(settings, no_work, data):
    write_idx(data, "t10k", np.zeros((3, 4, 4), np.uint8))
    (data / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"reference=.* \(1, 4, 4\); must be \(1, 8, 8\)"):
        prepare(settings())


def test_features_of_a_wrong_shape_are_refused(settings, no_work, script):
    with pytest.raises(ValueError, match=r"Flat.pt: gave shape \(2,\); must be .*\[2, D\]"):
        prepare(settings(features=script(Flat())))


def test_a_classifier_needs_labels(settings, no_work, data):
    (data / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="features='auto': must be a TorchScript file"):
        prepare(settings())


@pytest.mark.parametrize(
    ("package", "metrics"), [("torch_fidelity", ("kernel",)), ("matplotlib", ("bound",))]
)
def test_a_missing_package_is_refused(settings, no_work, monkeypatch, package, metrics):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(f"no {package}")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setitem(sys.modules, package, None)  # importlib looks here only
    with pytest.raises(ValueError, match=r"pip install flashddpm\[evaluate\]"):
        prepare(settings(metrics=metrics))


def test_other_classes_are_not_asked_for(settings, data, model):
    labels = np.arange(150, dtype=np.uint8) % 2
    header = b"\x00\x00\x08\x01" + np.array(labels.shape, ">u4").tobytes()
    (data / "train-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    result, _ = evaluate.evaluate(prepare(settings(metrics=("bound", "frechet"))))
    assert result["bound"]["labels"] == "none" and "recognised" not in result


def test_ctrl_c_and_a_diverging_network(monkeypatch, capfd, model, data, tmp_path):
    def run(error) -> tuple[int, str]:
        def sample(*args, **kwargs):
            raise error

        monkeypatch.setattr(fd.Sampler, "sample", sample)
        line = ["evaluate", model, data, "--metrics", "neighbours", "--num-steps", 2,
                "--out", tmp_path / "o.html"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["flashddpm", *map(str, line)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capfd.readouterr().err

    code, err = run(KeyboardInterrupt())
    assert code == 130 and "interrupted, nothing written" in err
    code, err = run(NonFiniteError(7, 1, 2))
    assert code == 2 and "seed 7 is not finite" in err
    assert not (tmp_path / "o.html").exists()


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_draw_has_each_number_once(count, more):
    total = count + more
    index = chosen(count, total).tolist()
    assert len(set(index)) == count and index == sorted(index)
    assert 0 <= index[0] <= index[-1] < total and index == chosen(count, total).tolist()
    assert chosen(total, total).tolist() == list(range(total))
    with pytest.raises(ValueError, match="count"):
        chosen(total + 1, total)


def test_a_draw_of_images_by_class_in_turn_has_every_class():
    assert all(70 < n < 130 for n in (chosen(1000, 10000) % 10).bincount().tolist())


def source_of(labels):
    """Images that tell their index, and these labels."""
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return ImageData(images, torch.tensor(labels), 3)


def test_real_images_beside_samples_have_the_samples_classes(monkeypatch):
    """A set drawn over all classes is further from any other by chance, so its distance higher."""
    monkeypatch.setattr(evaluate, "PART", 7)
    source = source_of([0] * 60 + [1] * 20 + [2] * 20)
    labels = [0, 1, 2] * 15 + [1, 1]
    images = evaluate.counterpart(source, len(labels), labels)
    index = images.flatten().tolist()
    assert len(set(index)) == len(labels)
    assert source.labels[index].bincount().tolist() == [15, 17, 15]
    again = evaluate.counterpart(source, len(labels), labels)
    assert torch.equal(images, again)
    assert sorted(index)[:15] != list(range(15))  # not the first of a class


def test_the_training_images_measured_have_the_samples_classes(settings, monkeypatch):
    work, asked, real = prepare(settings(metrics=("frechet",))), [], evaluate.counterpart
    monkeypatch.setattr(evaluate, "counterpart", lambda *args: asked.append(args) or real(*args))
    result, _ = evaluate.evaluate(work)
    [(source, count, labels)] = asked
    assert source is work.data and (count, labels) == (72, work.labels)
    assert result["frechet"]["training"] is not None


def test_no_real_images_beside_samples_where_there_are_too_few():
    source = source_of([0] * 60 + [1] * 20)
    assert evaluate.counterpart(source, 21, [1] * 21) is None
    assert evaluate.counterpart(source, 1, [2]) is None
    assert evaluate.counterpart(source, 81, None) is None
    assert len(evaluate.counterpart(source, 80, None)) == 80
    assert len(evaluate.counterpart(source, 80, source.labels.tolist())) == 80


def test_without_a_solver_the_report_names_the_default(settings, model):
    """The model's own is ddim; of ddpm see tests/cli/test_options.py."""
    work = prepare(settings(plan={"solver": None, "num_steps": None, "spacing": None}))
    assert work.settings.plan == {"solver": "ddim", "num_steps": 20, "spacing": None}


@given(st.lists(st.integers(-5, 5), min_size=1, unique=True))
def test_ranges_are_read_back(seeds):
    assert parse_seeds(evaluate._ranges(seeds), None) == seeds


def test_what_is_not_finite_is_null():
    value = {"a": [float("nan"), 1.0], "b": (float("inf"), "x"), "c": None}
    assert evaluate.jsonable(value) == {"a": [None, 1.0], "b": [None, "x"], "c": None}
