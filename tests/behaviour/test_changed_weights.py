"""Whoever changes a network's weights, and however: images are the changed network's, or none."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import flashddpm as fd
from flashddpm.execution import derived
from flashddpm.execution.derived import Derived, Glimpse, Words

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS, LABELS = [3, 4, 5], [0, 1, 2]


def load(unet, other):
    unet.load_state_dict(other.state_dict())


def average(unet, other):
    """As diffusers' EMAModel hands its averages to a network."""
    from diffusers.training_utils import EMAModel

    EMAModel(other.parameters()).copy_to(unet.parameters())


def optimize(unet, kind, **options):
    unet.requires_grad_(True)
    optimizer = kind(unet.parameters(), lr=0.05, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    unet.requires_grad_(False)


def adamw(unet, other):
    optimize(unet, AdamW)


def fused_adamw(unet, other):
    optimize(unet, AdamW, fused=True)


def sgd(unet, other):
    optimize(unet, SGD)


def assign(unet, other):
    for mine, theirs in zip(unet.parameters(), other.parameters(), strict=True):
        mine.data = torch.empty_like(mine).copy_(theirs)  # of the same layout


def copy_data(unet, other):
    for mine, theirs in zip(unet.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def in_place(unet, other):
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.5)


def replace_parameters(unet, other):
    for module in unet.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.neg(), requires_grad=False))


def merge(unet, other):
    """As a LoRA is merged: a product of low rank added to some matrices, the time's among them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, nn.Linear):
                a, b = (torch.randn(n, 2, generator=generator) for n in module.weight.shape)
                module.weight.add_(a @ b.T / 4)


def negate_one_tensor(unet, other):
    next(unet.resnets()).time_emb_proj.weight.data.neg_()


CHANGES = [
    *(load, average, adamw, fused_adamw, sgd, assign, copy_data, in_place, replace_parameters),
    *(merge, negate_one_tensor),
]


@pytest.fixture
def unets(tiny_unet):
    return tiny_unet(0, num_class_embeds=4), tiny_unet(1, num_class_embeds=4)


def draw(sampler, **options):
    return sampler.sample(SEEDS, LABELS, num_steps=4, **options)


def sample(sampler):
    return draw(sampler, solver="ddpm", guidance=1.5)


def sample_between_the_integers(sampler):
    return draw(sampler, solver="euler", spacing="linspace")


def predict(sampler):
    x = sampler.initial_noise(SEEDS)
    return sampler.predict(x, torch.tensor([3, 50, 99]), torch.tensor(LABELS))


def trajectory(sampler):
    return sampler.trajectory(SEEDS, LABELS, num_steps=4).run()


def engine(sampler):
    requests = [
        fd.Request(seed=s, label=y, num_steps=4) for s, y in zip(SEEDS, LABELS, strict=True)
    ]
    with fd.Engine(sampler, 2) as running:
        return torch.stack([f.result(60).image for f in [*map(running.submit, requests)]])


def pipelines(sampler):
    made = (fd.DDPMPipeline(sampler), fd.DDIMPipeline(sampler))
    options = {"seeds": SEEDS, "class_labels": LABELS, "output_type": "pt"}
    return torch.stack([p(num_inference_steps=4, **options).images for p in made])


def replaced(sampler):
    return draw(sampler.replace(backend="fused"))


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_in_draws_by_the_changed_network(tiny_sampler, unets, change):
    unet, other = unets
    sampler = tiny_sampler(unet)
    pipe, twin = fd.DDIMPipeline(sampler), sampler.replace()
    running = fd.Engine(sampler, 2, threaded=False)
    pipe(seeds=[1], class_labels=[1], num_inference_steps=4)
    old, _ = draw(sampler), draw(twin)
    running.submit(fd.Request(seed=1, label=1, num_steps=4))
    running.drain()  # its plan stays in the table
    with torch.inference_mode(False):
        change(unet, other)
    fresh = tiny_sampler(copy.deepcopy(unet))
    want = draw(fresh)
    assert (want - old).abs().max() > 1e-3
    for used in (sampler, twin, pipe.sampler):
        assert torch.equal(draw(used), want)
    for way in (sample, sample_between_the_integers, predict, trajectory, pipelines, replaced):
        assert torch.equal(way(sampler), way(fresh)), way
    future = running.submit(fd.Request(seed=SEEDS[0], label=LABELS[0], num_steps=4))
    running.drain()
    alone = fresh.sample(SEEDS[0], LABELS[0], num_steps=4)
    torch.testing.assert_close(future.result(0).image, alone[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(engine(sampler), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_a_trajectory_goes_on_by_the_network_as_it_is(tiny_sampler, unets, backend):
    """As the plain network does, which derives nothing."""
    images = []
    for kind in ("reference", backend):
        unet = copy.deepcopy(unets[0])
        path = tiny_sampler(unet, backend=kind).trajectory(SEEDS, LABELS, num_steps=4)
        path.step(2)
        in_place(unet, None)
        images.append(path.run())
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


def test_a_compiled_network_follows_its_weights(tiny_sampler, unets):
    unet, other = unets
    sampler = tiny_sampler(unet, compile=True)
    first = draw(sampler)
    for change in (load, in_place, negate_one_tensor, assign):
        change(unet, other)
        want = draw(tiny_sampler(copy.deepcopy(unet)))
        torch.testing.assert_close(draw(sampler), want, rtol=0, atol=1e-4)
        assert (want - first).abs().max() > 1e-3
        first = want


def test_networks_of_ones_own_are_followed_too():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x_t, t):
            return x_t * self.scale

    network = Own()
    sampler = fd.Sampler(network, fd.NoiseSchedule.create(), shape=(1, 8, 8))
    before = sampler.sample(0, num_steps=3)
    network.scale.data.fill_(-0.5)
    fresh = fd.Sampler(network, fd.NoiseSchedule.create(), shape=(1, 8, 8))
    assert torch.equal(sampler.sample(0, num_steps=3), fresh.sample(0, num_steps=3))
    assert (sampler.sample(0, num_steps=3) - before).abs().max() > 0.1


class TestEngine:
    """Images on their way are of one network, or fail and say what to use instead."""

    @pytest.mark.parametrize("change", [load, fused_adamw, assign, merge, negate_one_tensor])
    def test_weights_changed_under_an_image(self, tiny_sampler, unets, change):
        unet, other = unets
        sampler = tiny_sampler(unet)
        running = fd.Engine(sampler, 2, threaded=False)
        under_way = running.submit(fd.Request(seed=1, label=1, num_steps=4))
        running.turn()
        running.turn()
        change(unet, other)
        later = running.submit(fd.Request(seed=2, label=1, num_steps=4))
        running.drain()
        with pytest.raises(fd.RequestFailed, match="update_weights") as caught:
            under_way.result(0)
        assert isinstance(caught.value.__cause__, RuntimeError)
        want = tiny_sampler(copy.deepcopy(unet)).sample(2, 1, num_steps=4)[0]
        torch.testing.assert_close(later.result(0).image, want, rtol=0, atol=1e-6)
        assert running.metrics()["failed"] == 1

    def test_weights_changed_under_an_image_that_nobody_follows(self, tiny_sampler, unets):
        """No later request comes in, by which the change would be seen."""
        running = fd.Engine(tiny_sampler(unets[0]), 2, threaded=False)
        under_way = running.submit(fd.Request(seed=1, label=1, num_steps=2))
        running.turn()
        load(*unets)
        running.drain()
        with pytest.raises(fd.RequestFailed, match="were changed while the image was under way"):
            under_way.result(0)

    def test_weights_that_were_changed_and_put_back(self, tiny_sampler, unets):
        """As for a preview of a training run's averages, by the sampler that the engine has."""
        unet, other = unets
        sampler, own = tiny_sampler(unet), copy.deepcopy(unet)
        running = fd.Engine(sampler, 2, threaded=False)
        under_way = running.submit(fd.Request(seed=1, label=1, num_steps=3))
        running.turn()
        load(unet, other)
        draw(sampler)
        load(unet, own)
        running.drain()
        with pytest.raises(fd.RequestFailed, match="update_weights"):
            under_way.result(0)

    @pytest.mark.parametrize("moment", ["renew", "follow_weights", "admit", "start"])
    def test_weights_changed_while_an_image_enters(self, tiny_sampler, unets, monkeypatch, moment):
        """The image is of the network before or after, or fails."""
        unet, other = unets
        old, new = tiny_sampler(copy.deepcopy(unet)), tiny_sampler(copy.deepcopy(other))
        running = fd.Engine(tiny_sampler(unet), 2, threaded=False)
        batch = running._loop.batch
        owner = batch.executor if moment == "renew" else batch
        method = getattr(owner, moment)

        def changing(*args):
            value = method(*args)
            load(unet, other)
            return value

        monkeypatch.setattr(owner, moment, changing)
        future = running.submit(fd.Request(seed=1, label=1, num_steps=4))
        running.drain()
        if future.exception(0) is None:
            images = [sampler.sample(1, 1, num_steps=4)[0] for sampler in (old, new)]
            assert min((future.result(0).image - x).abs().max() for x in images) < 1e-5
        else:
            assert "update_weights" in str(future.exception(0))

    @pytest.mark.parametrize("threaded", [True, False])
    @pytest.mark.parametrize("by", ["engine", "sampler"])
    def test_update_weights_lets_images_end(self, tiny_sampler, unets, threaded, by):
        unet, other = unets
        sampler = tiny_sampler(unet)
        old, new = tiny_sampler(copy.deepcopy(unet)), tiny_sampler(copy.deepcopy(other))
        begun = threading.Event()
        with fd.Engine(sampler, 2, threaded=threaded) as running:
            first = [
                running.submit(
                    fd.Request(seed=i, label=1, num_steps=20), on_step=lambda x0: begun.set()
                )
                for i in range(2)
            ]
            waiting = [running.submit(fd.Request(seed=i, label=1, num_steps=3)) for i in range(4)]
            if not threaded:
                running.turn()
            assert begun.wait(60)
            {"engine": running, "sampler": sampler}[by].update_weights(other.state_dict())
            assert all(future.done() for future in first)
            assert not any(future.done() for future in waiting[2:])
            running.drain()
            images = [f.result(60).image for f in (*first, *waiting)]
        for i in range(2):
            want = old.sample(i, 1, num_steps=20)[0]
            torch.testing.assert_close(images[i], want, rtol=0, atol=1e-5)
        for i in range(4):
            want = new.sample(i, 1, num_steps=3)[0]
            torch.testing.assert_close(images[2 + i], want, rtol=0, atol=1e-5)

    def test_bad_states_change_nothing_and_wait_for_nobody(self, tiny_sampler, unets):
        running = fd.Engine(tiny_sampler(unets[0]), 2, threaded=False)
        future = running.submit(fd.Request(seed=1, label=1, num_steps=2))
        running.turn()
        with pytest.raises(ValueError, match="state: does not match"):
            running.update_weights({})
        assert not future.done()
        running.drain()
        assert future.result(0).image.isfinite().all()

    def test_nobody_enters_while_the_queue_is_held(self, tiny_sampler, unets):
        running = fd.Engine(tiny_sampler(unets[0]), 2, threaded=False)
        future = running.submit(fd.Request(seed=1, label=1, num_steps=2))
        scheduler = running._scheduler
        (image,) = scheduler._waiting
        with scheduler.held():
            assert scheduler._first() is None and not scheduler._run(image)
            running.turn()
            assert scheduler.active == 0
        running.drain()
        assert future.result(0).image.isfinite().all()

    def test_a_callback_of_a_future_without_a_thread(self, tiny_sampler, unets):
        unet, other = unets
        running = fd.Engine(tiny_sampler(unet), 2, threaded=False)
        raised = []

        def update(future):
            with pytest.raises(RuntimeError, match="a callback called it"):
                running.update_weights(other.state_dict())
            raised.append(future)

        for seed in range(2):
            running.submit(fd.Request(seed=seed, label=1, num_steps=2)).add_done_callback(update)
        running.drain()
        assert len(raised) == 2

    def test_a_method_of_a_network_is_seen_too(self, tiny_sampler, unets):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(0.5))
                self.marker = nn.Parameter(torch.empty(0))

            def forward(self, x_t, t):
                return x_t * self.scale

        own = Own()
        sampler = fd.Sampler(own.forward, fd.NoiseSchedule.create(), shape=(1, 8, 8))
        running = fd.Engine(sampler, 2, threaded=False)
        future = running.submit(fd.Request(seed=1, num_steps=3))
        running.turn()
        own.scale.data.fill_(0.25)
        running.drain()
        assert "update_weights" in str(future.exception(0))

    def test_a_callback_that_would_wait_for_itself(self, tiny_sampler, unets):
        unet, other = unets
        with fd.Engine(tiny_sampler(unet), 2) as running:
            future = running.submit(
                fd.Request(seed=1, label=1, num_steps=2),
                on_step=lambda x0: running.update_weights(other.state_dict()),
            )
            with pytest.raises(fd.RequestFailed, match="a callback called it"):
                future.result(60)
            assert running.submit(fd.Request(seed=1, label=1, num_steps=2)).result(60)


def test_weights_changed_during_a_call(tiny_sampler, unets):
    """By another thread, or, as here, by a callback."""
    unet, other = unets
    sampler = tiny_sampler(unet)
    with pytest.raises(RuntimeError, match="changed while the image was under way"):
        draw(sampler, on_step=lambda i, x0: load(unet, other) if i == 1 else None)
    path = sampler.trajectory(SEEDS, LABELS, num_steps=4)
    path.step()
    load(unet, tiny_sampler(copy.deepcopy(unet)).network)  # the same: nothing to see
    path.step()
    assert torch.equal(draw(sampler), draw(tiny_sampler(copy.deepcopy(unet))))


def test_update_weights_by_the_samplers_own_callback(tiny_sampler, unets):
    """Beside an engine that waits for the sampler it would never end."""
    unet, other = unets
    sampler = tiny_sampler(unet)
    running = fd.Engine(sampler, 2, threaded=False)
    running.submit(fd.Request(seed=1, label=1, num_steps=4))
    running.turn()
    with pytest.raises(RuntimeError, match="a callback called the sampler"):
        draw(sampler, on_step=lambda i, x0: sampler.update_weights(other.state_dict()))


def test_a_network_that_was_moved_is_refused(tiny_sampler, unets):
    sampler = tiny_sampler(unets[0])
    draw(sampler)
    unets[0].to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="were torch.float32 on cpu and are torch.bfloat16"):
        draw(sampler)


def checksum(tensors):
    return derived.checksum(Words(lambda: tensors).read())


class TestChecksum:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
    @pytest.mark.parametrize("shape", [(1,), (7, 3), (4, 6, 3, 3), (derived.CHUNK + 1,)])
    def test_any_change_shows(self, dtype, shape):
        x = torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(100).add(1).to(dtype)
        changed = [x.clone() for _ in range(5)]
        changed[0].view(-1)[-1] += 1
        changed[1].neg_()
        changed[2].view(-1)[0].neg_()
        changed[3].view(-1)[:2].neg_()
        changed[4].copy_(changed[4].flip(tuple(range(x.ndim))))
        sums = {tuple(checksum([y]).tolist()) for y in (x, *changed)}
        # Of one number, all but the first change are the same, or none.
        assert len(sums) == (6 if x.numel() > 1 else 3)
        assert torch.equal(checksum([x]), checksum([x.clone()]))

    def test_order_and_layout(self):
        x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        assert not torch.equal(checksum([x, y]), checksum([y, x]))
        strided = x.to(memory_format=torch.channels_last)
        assert checksum([strided]).shape == checksum([x]).shape
        assert checksum([torch.randn(8, 8)[:, ::2]]).isfinite().all()

    def test_parameters_of_every_layout_can_be_looked_at(self):
        whole = torch.randn(1000)
        module = nn.Module()
        module.empty = nn.Parameter(torch.empty(0))
        module.column = nn.Parameter(whole[:64].view(8, 8)[:, 3], requires_grad=False)
        module.sixteen = nn.Parameter(whole.bfloat16()[1:9], requires_grad=False)
        module.odd = nn.Parameter(whole.half()[1:8], requires_grad=False)
        module.float64 = nn.Parameter(whole.double()[3:9], requires_grad=False)
        module.complex = nn.Parameter(torch.view_as_complex(whole[:8].view(4, 2).clone()))
        glimpse, seen = Glimpse([module]), []
        for parameter in (None, *list(module.parameters())[1:]):
            if parameter is not None:
                parameter.data.mul_(3)
            seen += [(glimpse.take().tolist(), checksum(list(module.parameters())).tolist())]
            assert seen[-1][0] == glimpse.take().tolist()
        assert all(seen.count(one) == 1 for one in seen)
        assert Glimpse([nn.Identity()]).take() is None

    def test_what_is_derived_is_computed_only_when_its_sources_change(self):
        x, computed = torch.ones(3), []
        state = Derived(lambda: iter([x]), lambda: computed.append(x.sum().item()))
        assert [state.renew(), state.renew()] == [1, 1]
        x.data[1] = 5
        assert [state.renew(), state.renew()] == [2, 2]
        assert computed == [3, 7]

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_glimpse_sees_what_changes_parameters(self, unets, change):
        unet, other = unets
        glimpse = Glimpse([unet])
        before = glimpse.take()
        assert torch.equal(before, glimpse.take())
        change(unet, other)
        assert not torch.equal(before, glimpse.take())
