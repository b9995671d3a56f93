"""The noise of the CPU: the reference's bits when compiled, drawn within its share of memory."""

import torch

from flashddpm.execution.cpu_noise import CompiledNoise
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Purpose


def test_noise_of_many_steps_is_drawn_within_the_memory_cap(tiny_sampler, monkeypatch):
    want = tiny_sampler().sample(range(3), 0, num_steps=9, solver="ddpm")
    sizes = []
    real = reference.philox

    def watch(seeds, keys, shape, purpose):
        if purpose == Purpose.REVERSE_STEP:
            sizes.append(len(seeds))
        return real(seeds, keys, shape, purpose)

    monkeypatch.setattr("flashddpm.execution.cpu_noise.NOISE_BYTES", 4 * 64 * 3 * 4)
    monkeypatch.setattr(reference, "philox", watch)
    assert torch.equal(tiny_sampler().sample(range(3), 0, num_steps=9, solver="ddpm"), want)
    assert sizes == [12, 12]  # four steps, four steps, and the last one, which draws none


def test_compiled_noise_is_the_reference_bit_for_bit():
    seeds = torch.tensor([0, 42, -1, 2**62 + 12345])
    keys = torch.tensor([0, 7, -5, 2**40])
    draw = CompiledNoise()
    for shape in ((1, 28, 28), (3, 5, 7)):
        for purpose in (Purpose.INITIAL, Purpose.REVERSE_STEP):
            want = reference.philox(seeds, keys, shape, purpose)
            assert torch.equal(draw(seeds, keys, shape, purpose), want)
