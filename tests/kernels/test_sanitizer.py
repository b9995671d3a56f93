"""What the tests of compute-sanitizer do where there is none: ``tests/kernels/test_gpu.py``."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("required", "outcome"),
    [(None, pytest.skip.Exception), ("0", pytest.skip.Exception), ("1", pytest.fail.Exception)],
)
def test_a_missing_sanitizer_is_told_and_can_be_a_failure(monkeypatch, tmp_path, required, outcome):
    path = Path(__file__).with_name("test_gpu.py")
    spec = importlib.util.spec_from_file_location("gpu_tests", path)
    on_a_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(on_a_gpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("FLASHDDPM_REQUIRE_SANITIZER", raising=False)
    if required is not None:
        monkeypatch.setenv("FLASHDDPM_REQUIRE_SANITIZER", required)
    either = (pytest.skip.Exception, pytest.fail.Exception)  # a skip let through would skip this
    with pytest.raises(either, match="compute-sanitizer, of the CUDA toolkit, is not on") as raised:
        on_a_gpu.sanitized("memcheck", "short_run")
    assert raised.type is outcome
