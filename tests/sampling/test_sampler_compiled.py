"""Compiled networks: exact bits, one compilation a bucket, and what auto compiles."""

import pytest
import torch

import flashddpm as fd


@pytest.mark.parametrize(
    "threads", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 5))]
)
def test_exact_bits_do_not_depend_on_the_others(tiny_sampler, threads):
    """One compiled shape: alone, in a crowd, in the last chunk, guided or not.

    For each number of threads; with one, torch's convolutions themselves round differently.
    """
    sampler = tiny_sampler(compile="auto")
    ask = {"solver": "ddpm", "num_steps": 3, "batch_size": 4, "exact": True}
    seeds, labels, guidance = range(7), [i % 3 for i in range(7)], [1.0, 2.0] * 3 + [1.0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want = sampler.sample(seeds, labels, guidance, **ask)
        for i in (0, 1, 6):
            alone = sampler.sample(seeds[i], labels[i], guidance[i], **ask)
            assert torch.equal(alone[0], want[i])
        fewer = sampler.sample(seeds, labels, guidance, **ask | {"batch_size": 2, "bucket": 8})
        assert torch.equal(fewer, want)  # the same bucket, though it holds half as many images
        plain = sampler.sample(seeds, labels, guidance, **ask | {"exact": False})
        assert (plain - want).abs().max() <= 1e-3
    finally:
        torch.set_num_threads(before)


def test_exact_is_refused_where_bits_depend_on_the_lane(tiny_sampler, monkeypatch):
    """As the compiled network's do on the CPU for some odd sizes, in vector tails."""
    sampler = tiny_sampler(compile="auto")

    def network(x_t, told, labels, index):
        return x_t * 0.5 + 1e-7 * torch.arange(len(x_t)).reshape(-1, 1, 1, 1)

    sampler.executor.choice.compiled.network = network
    with pytest.raises(ValueError, match=r"exact=True: on this machine .* lanes of 8"):
        sampler.sample(0, 0, num_steps=2, batch_size=4, exact=True)
    sampler.executor.choice.compiled.network = lambda x, told, y, index: x * 0.5
    assert sampler.sample(0, 0, num_steps=2, batch_size=4, exact=True).isfinite().all()


def test_exact_is_refused_where_nothing_is_compiled(tiny_sampler):
    for options in ({"compile": False}, {"backend": "reference"}):
        sampler = tiny_sampler(**options)
        with pytest.raises(ValueError, match="exact=True: needs a compiled network"):
            sampler.sample(0, 0, exact=True)
    with pytest.raises(ValueError, match="timesteps between the integers"):
        own = fd.Sampler(lambda x, t: x, fd.NoiseSchedule.create(), shape=(1, 8, 8), compile=True)
        own.sample(0, exact=True, solver="euler", spacing="linspace")
    with pytest.raises(ValueError, match="exact=1: must be true or false"):
        tiny_sampler().sample(0, 0, exact=1)


def test_compiled_equals_eager(tiny_sampler):
    eager, compiled = tiny_sampler(), tiny_sampler(compile=True)
    run, labels = {"num_steps": 5, "solver": "ddpm"}, [0, 1, 2, 0, 1]
    want = eager.sample(range(5), labels, **run)
    got = compiled.sample(range(5), labels, batch_size=3, **run)  # the last chunk is padded
    assert (got - want).abs().max() <= 1e-5
    execution = compiled.executor
    choice = execution.choice
    assert choice.network(True) is not choice.network(False)


def test_compiles_once_for_each_number_of_lanes(tiny_sampler, tiny_unet, monkeypatch):
    """Ten buckets are ten compilations, where Dynamo alone would stop at eight.

    Left alone ten sizes of batch are five: the powers of two.
    """
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(1)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **k: real(f, backend=backend, **k))

    def make():
        level = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        unet = tiny_unet(num_class_embeds=4, block_out_channels=(8,), **level)
        return tiny_sampler(unet, compile=True)

    sampler = make()
    for _ in range(2):
        for lanes in range(1, 11):
            sampler.sample(range(lanes), 0, num_steps=2, bucket=lanes)
    assert len(compiled) == 10
    torch.compiler.reset()  # code is shared by networks of one shape
    sampler, compiled[:] = make(), []
    for _ in range(2):
        for lanes in range(1, 11):
            sampler.sample(range(lanes), 0, num_steps=2)
    assert len(compiled) == 5


def test_auto_compiles_only_what_repays(tiny_sampler):
    sampler = tiny_sampler(compile="auto")
    assert sampler.executor.choice.auto(100)[0] is False
    assert sampler.executor.choice.auto(10**9)[0] is True
    foreign = fd.Sampler(lambda x, t: x, sampler.schedule, shape=(1, 8, 8), device="cpu")
    assert "foreign" in foreign.executor.choice.auto(10**9)[1]
