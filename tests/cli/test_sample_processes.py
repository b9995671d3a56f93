"""``flashddpm sample`` over several processes: the files of one, through kills and errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import flashddpm as fd
from flashddpm import distributed
from flashddpm.checkpoints.model_folder import fingerprint, save_model
from flashddpm.cli import main as cli
from flashddpm.cli import manifest

THREADS = max(1, distributed.cores() // 2)
"""What each of two processes takes; the one that they are compared with must take as many."""

COMMAND = os.path.join(os.path.dirname(sys.executable), "flashddpm")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def model(tiny_unet, tmp_path):
    folder = tmp_path / "model"
    unet = tiny_unet(num_class_embeds=4)
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 50}
    save_model(folder, unet.config, unet.state_dict(), scheduler, fd.Conditioning(3, 3))
    return folder


@pytest.fixture
def alone(monkeypatch, capfd):
    """Run ``flashddpm sample`` in this process: (exit code, stdout, stderr)."""
    threads = torch.get_num_threads()

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashddpm", "sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    torch.set_num_threads(THREADS)
    yield call
    torch.set_num_threads(threads)


def torchrun(*arguments, forked=()) -> subprocess.Popen:
    """Start two processes of ``flashddpm sample``, which may begin in forks, and torchrun too."""
    launcher = [*(forked or (sys.executable, "-P")), *TORCHRUN, "--no-python"]
    return subprocess.Popen(
        [*launcher, *forked, COMMAND, "sample", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".png"}


def processes(folder) -> list[int]:
    """Return those whose command names the folder: torchrun and its two."""
    found = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if str(folder) in line]


def test_two_processes_write_the_files_of_one(model, alone, tmp_path):
    options = (model, "--device", "cpu", "--seeds", "5,-1,9", "--labels", "2,0,1", "--batch-size",
               1, "--solver", "ddpm", "--num-steps", 4, "--guidance", 2)  # fmt: skip
    run = torchrun(*options, "--out", tmp_path / "two")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    lines = [line for line in out.splitlines() if "images" in line]
    assert len(lines) == 1 and lines[0].startswith("3 images, 4 steps, ")
    assert "cpu, fused, 2 processes -> " in lines[0]
    assert err.count("flashddpm: runs on cpu") == 1
    assert alone(*options, "--out", tmp_path / "one")[0] == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sorted(contents(tmp_path / "one")) == ["-1.png", "5.png", "9.png"]
    two, one = (json.loads((tmp_path / n / manifest.NAME).read_text()) for n in ("two", "one"))
    assert two["complete"] and one["complete"]
    assert two["settings"] == one["settings"]
    assert two["settings"]["model"] == fingerprint(model)
    assert two["run"] == {**one["run"], "world_size": 2}
    assert two["images"] == {
        "5.png": {"seed": 5, "label": 2, "rank": 0},
        "-1.png": {"seed": -1, "label": 0, "rank": 1},
        "9.png": {"seed": 9, "label": 1, "rank": 0},
    }


def test_a_killed_run_is_finished_by_the_same_command(forked, model, alone, tmp_path):
    out = tmp_path / "out"
    options = (model, "--device", "cpu", "--num-images", 31, "--batch-size", 2, "--num-steps", 10)
    run = torchrun(*options, "--out", out, forked=forked)
    try:
        end = time.monotonic() + 100
        while not (out.exists() and len(contents(out)) >= 3):
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.002)
    finally:
        killed = processes(out)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        run.communicate()
    assert len(killed) == 3
    time.sleep(0.2)  # for the killed processes to be gone
    early = contents(out)
    assert 3 <= len(early) < 31
    assert json.loads((out / manifest.NAME).read_text())["complete"] is False
    (out / ".3.png.123.tmp").write_bytes(b"torn")
    times = {name: (out / name).stat().st_mtime_ns for name in early}

    run = torchrun(*options, "--out", out, forked=forked)
    text, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert f"{31 - len(early)} images, " in text and f", {len(early)} were there -> " in text
    assert {name: (out / name).stat().st_mtime_ns for name in early} == times
    alone(*options, "--out", tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")
    assert len(contents(out)) == 31
    assert sorted(p.name for p in out.iterdir()) == sorted([*contents(out), manifest.NAME])
    assert json.loads((out / manifest.NAME).read_text())["complete"] is True


# One start of torchrun for several calls of the command: they join once, and an error ends them.
SCENES = """
import os, sys
from contextlib import nullcontext
from flashddpm.cli import exits, main as cli
from flashddpm.cli.sample_job import SampleJob
from flashddpm.distributed import World
model, root, first_failure = sys.argv[1:]
rank, real = int(os.environ["RANK"]), SampleJob.draw
def failing(self, part, *rest):
    if rank == 1 and part.start >= int(first_failure):
        raise FloatingPointError("planted in process 1")
    return real(self, part, *rest)
leave = exits.leave_torchrun
exits.leave_torchrun = lambda code: leave(code) if code else None
def call(*arguments):
    sys.argv = ["flashddpm", "sample", model, "--num-steps", "3", "--device", "cpu", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
with World.from_environment().joined("cpu"):
    World.joined = lambda *_: nullcontext()
    if first_failure == "0":
        call("--num-images", "1", "--out", root + "/single")
        call("--num-images", "5", "--batch-size", "2", "--out", root + "/grid.png")
    SampleJob.draw = failing
    call("--num-images", "6", "--batch-size", "1", "--out", root + "/failed")
"""


def scenes(forked, model, tmp_path, first_failure: str) -> tuple[int, str, str]:
    script = tmp_path / "scenes.py"
    script.write_text(SCENES)
    command = [*forked, *TORCHRUN, "--no-python", *forked, str(script)]
    end = subprocess.run(
        [*command, str(model), str(tmp_path), first_failure],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return end.returncode, end.stdout, end.stderr


def errors_of(err: str) -> list[str]:
    """Return our errors; they stand before torchrun's report, perhaps behind a line's beginning."""
    ours, _, report = err.partition("exitcode: 2")
    assert "flashddpm: error" not in report and "exitcode  : 2" in report
    return re.findall("flashddpm: error: .*", ours)


def test_one_image_a_picture_and_an_error_in_the_first_batch(forked, model, alone, tmp_path):
    code, out, err = scenes(forked, model, tmp_path, "0")
    lines = [line.split(",")[0] for line in out.splitlines() if "->" in line]
    assert lines == ["1 images", "5 images"]
    assert err.count("1 of 2 processes have nothing to draw: 1 images are 1 of batch_size=64") == 1
    assert code == 1 and errors_of(err) == ["flashddpm: error: planted in process 1"]
    assert not (tmp_path / "failed").exists()

    common = (model, "--num-steps", 3, "--device", "cpu")
    alone(*common, "--num-images", 1, "--out", tmp_path / "one")
    alone(*common, "--num-images", 5, "--batch-size", 2, "--out", tmp_path / "one.png")
    assert contents(tmp_path / "single") == contents(tmp_path / "one")
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_a_later_error_of_one_process_ends_all_and_keeps_what_is_finished(forked, model, tmp_path):
    code, out, err = scenes(forked, model, tmp_path, "3")
    assert code == 1 and "->" not in out
    assert errors_of(err) == ["flashddpm: error: planted in process 1"]
    files = contents(tmp_path / "failed")
    assert "1.png" in files and not {"3.png", "5.png"} & set(files)
    assert json.loads((tmp_path / "failed" / manifest.NAME).read_text())["complete"] is False


@pytest.mark.gpu
def test_two_gpus_draw_the_picture_of_one(model, alone, tmp_path):
    """Never run yet: no machine with two GPUs was at hand. The images are added up over NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = (model, "--device", "cuda", "--num-images", 6, "--batch-size", 2, "--num-steps", 4)
    for out in ("grid.png", "folder"):
        run = torchrun(*options, "--out", tmp_path / out)
        _, err = run.communicate(timeout=200)
        assert run.returncode == 0, err
    alone(*options, "--out", tmp_path / "one.png")
    alone(*options, "--out", tmp_path / "one")
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert contents(tmp_path / "folder") == contents(tmp_path / "one")
