"""A folder of images is gone on with, added to or refused, by what its manifest says."""

import json
import shutil
import sys

import pytest

import flashddpm as fd
from flashddpm.checkpoints.model_folder import fingerprint, save_model
from flashddpm.cli import main as cli
from flashddpm.cli import manifest
from flashddpm.cli.sample_job import SampleOptions, prepare
from flashddpm.distributed import World


@pytest.fixture
def model(tiny_unet, tmp_path):
    folder = tmp_path / "model"
    unet = tiny_unet(num_class_embeds=4)
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 50}
    save_model(folder, unet.config, unet.state_dict(), scheduler, fd.Conditioning(3, 3))
    return folder


@pytest.fixture
def run(monkeypatch, capfd, model, tmp_path):
    """Run ``flashddpm sample`` into tmp_path/out: (exit code, stdout, stderr)."""

    def call(*arguments, folder=model) -> tuple[int, str, str]:
        line = ["sample", folder, "--device", "cpu", "--num-steps", 2, "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["flashddpm", *map(str, line + list(arguments))])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return call


def state(folder) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def test_the_same_command_does_nothing_new(run, tmp_path):
    assert run("--num-images", 5)[0] == 0
    first = state(tmp_path / "out")
    code, out, _ = run("--num-images", 5)
    assert code == 0 and out.startswith("0 images, ") and ", 5 were there -> " in out
    assert state(tmp_path / "out") == first


def test_a_missing_image_is_drawn_in_its_batch_again(run, tmp_path, monkeypatch):
    run("--num-images", 7, "--batch-size", 3)
    out = tmp_path / "out"
    first = state(out)
    (out / "4.png").unlink()
    drawn = []
    real = fd.Sampler.sample
    monkeypatch.setattr(
        fd.Sampler, "sample", lambda *a, **k: drawn.append(list(a[1])) or real(*a, **k)
    )
    run("--num-images", 7, "--batch-size", 3)
    assert drawn == [[3, 4, 5]]
    second = state(out)
    assert {n: c for n, (_, c) in second.items()} == {n: c for n, (_, c) in first.items()}
    assert {n for n in first if first[n] != second[n]} <= {"4.png", manifest.NAME}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-steps", 3), "other settings: num_steps=2 there, 3 now"),
        (("--solver", "ddpm"), "solver='ddim' there, 'ddpm' now"),
        (("--guidance", 2), "guidance=1.0 there, 2.0 now"),
        (("--dtype", "bfloat16"), "dtype='float32' there, 'bfloat16' now"),
        (("--labels", "0"), "1.png is of another label=1 there, 0 now"),
    ],
)
def test_other_settings_are_refused_and_named(run, tmp_path, options, message):
    run("--num-images", 3)
    first = state(tmp_path / "out")
    code, out, err = run("--num-images", 3, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert state(tmp_path / "out") == first


@pytest.mark.parametrize(
    ("labels", "message"),
    [("1,2", "2 labels for 3 seeds"), ("1,2,9", "labels=9: must be in 0..")],
)
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(
    run, tmp_path, labels, message
):
    code, out, err = run("--num-images", 3, "--labels", labels)
    assert (code, out) == (2, "") and message in err
    assert not (tmp_path / "out").exists()


def test_other_weights_and_configs_are_refused(run, model, tmp_path):
    run("--num-images", 3)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    assert fingerprint(other) == fingerprint(model)
    assert run("--num-images", 3, folder=other)[0] == 0
    for name in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        shutil.copytree(model, other, dirs_exist_ok=True)
        content = bytearray((other / name).read_bytes())
        if name.endswith(".json"):
            content += b" "
        else:
            content[-2] ^= 1
        (other / name).write_bytes(content)
        code, _, err = run("--num-images", 3, folder=other)
        assert code == 2 and "other settings: model='sha256:" in err
    shutil.copytree(model, other, dirs_exist_ok=True)
    (other / "notes.txt").write_text("no part of the model")
    assert fingerprint(other) == fingerprint(model)


def test_other_seeds_are_added(run, tmp_path, caplog):
    caplog.set_level("INFO", "flashddpm")
    run("--num-images", 3)
    code, out, _ = run("--seeds", "1:5", "--labels", "1,2,0,1", "--batch-size", 2)
    assert code == 0 and out.startswith("2 images, ") and ", 2 were there" in out
    assert "last bits may differ" in caplog.text and "batch_size=64 there, 2 now" in caplog.text
    value = json.loads((tmp_path / "out" / manifest.NAME).read_text())
    assert list(value["images"]) == [f"{i}.png" for i in range(5)] and value["complete"]


def test_files_of_others_are_kept_or_refused(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "1.png").write_bytes(b"of someone else")
    code, _, err = run("--num-images", 3)
    assert code == 2 and "holds 1.png already, which no manifest.json names" in err
    assert list(state(out)) == ["1.png"]
    assert run("--seeds", "2,3")[0] == 0
    assert (out / "1.png").read_bytes() == b"of someone else"
    code, _, err = run("--num-images", 3)
    assert code == 2 and "holds 1.png already" in err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "[" * 100000,
    '{"format": 1, "settings": {}, "run": {}, "images": {"1.png": 3}}'])  # fmt: skip
def test_a_broken_manifest_is_named(run, tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / manifest.NAME).write_text(text)
    code, _, err = run("--num-images", 1)
    assert code == 2 and "manifest.json: " in err and "Traceback" not in err
    assert (out / manifest.NAME).read_text() == text


def test_a_bad_option_leaves_no_folder(run, tmp_path):
    assert run("--num-images", 1, "--guidance", "nan")[0] == 2
    assert run("--num-images", 1, "--labels", "7")[0] == 2
    assert run("--num-images", 1, "--batch-size", "0")[0] == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    code, _, err = run("--num-images", 1)
    assert code == 2 and "is a file; must be a folder" in err


def test_a_trajectory_is_of_one_process(model, tmp_path):
    options = {"num_steps": 2}
    request = SampleOptions(
        model, tmp_path / "o", 2, None, None, "cpu", None, "auto", "off", 2,
        tmp_path / "t.gif", options,
    )  # fmt: skip
    with pytest.raises(ValueError, match="trajectory=.*: is drawn by one process only"):
        prepare(request, World(0, 2, 0, 2))
