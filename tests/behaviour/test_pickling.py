"""What becomes of errors, samplers and plans that are pickled to other processes, or copied."""

import copy
import importlib
import pickle
import pkgutil
import re
import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import flashddpm as fd
from flashddpm.errors import DivergedError
from flashddpm.integrations.diffusers_pipelines import DDIMPipeline, DDPMPipeline
from flashddpm.testing.check import CheckFailed
from flashddpm.testing.strategies import Case

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = [1, 2]
LIMIT = 30
"""Seconds that an image may take, which takes less than one."""


def draw(sampler: fd.Sampler) -> torch.Tensor:
    return sampler.sample(SEEDS, num_steps=2)


class Two(Exception):
    """Does not come back from a pickle, which gives it its one argument."""

    def __init__(self, one: str, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Twice(Exception):
    """Comes back from a pickle with another message."""

    def __init__(self, text: str) -> None:
        super().__init__(f"twice: {text}")


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


class TestErrors:
    @staticmethod
    def classes() -> list[type[BaseException]]:
        """Return every class of an error in the package, by importing what has any class."""
        found = []
        for info in pkgutil.walk_packages(fd.__path__, "flashddpm."):
            if info.name.endswith("__main__"):
                continue
            file = info.module_finder.find_spec(info.name, None).origin
            if not re.search(r"^\s*class \w+\(", Path(file).read_text(), re.M):
                continue
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, type) and issubclass(value, BaseException):
                    found.append(value)
        return [kind for kind in dict.fromkeys(found) if kind.__module__.startswith("flashddpm.")]

    @staticmethod
    def example(kind: type[BaseException]) -> BaseException:
        """Return one; of a class that does not take one text alone, say here what it takes."""
        given: dict[type, tuple[Any, ...]] = {
            DivergedError: (7,),
            fd.NonFiniteError: (2**63, 4, 50),
            CheckFailed: (
                {
                    "values": (Case(torch.bfloat16, (3, 5)), AssertionError("off by 1")),
                    "compiled_code": (None, ZeroDivisionError("of a kernel")),
                },
                ["red_zones"],
            ),
        }
        return kind(*given.get(kind, ("what was wrong",)))

    @staticmethod
    def content(error: BaseException) -> tuple[Any, ...]:
        attributes = dict(vars(error))
        failures = attributes.pop("failures", {})
        read = {name: (case, type(why), str(why)) for name, (case, why) in failures.items()}
        return type(error), str(error), error.args, attributes, read

    def test_every_error_arrives_whole(self):
        kinds = self.classes()
        assert {fd.NonFiniteError, fd.EngineClosed, CheckFailed, DivergedError} <= set(kinds)
        for kind in kinds:
            error = self.example(kind)
            error.add_note("a note")
            for there in (sent(error), copy.copy(error), sent(sent(error))):
                assert self.content(there) == self.content(error)
                assert there.__cause__ is None and not there.__suppress_context__
            error.__cause__ = fd.CheckpointError("within")
            error.__cause__.__cause__ = KeyError("unet")
            error.__cause__.__cause__.__cause__ = OSError(5, "of the disk", "a file")
            there, expected = sent(error), error
            for _ in range(4):
                assert self.content(there) == self.content(expected)
                there, expected = there.__cause__, expected.__cause__
            assert there is None

    def test_a_cause_that_cannot_be_sent_says_what_it_was(self):
        class Local(Exception):
            pass

        holds = ValueError("holds a lock", threading.Lock())
        for cause in (Local("local"), Two("one", 2), Twice("text"), holds):
            cause.__cause__ = KeyError("first")
            error = fd.RequestFailed("step")
            error.__cause__ = cause
            there = sent(error).__cause__
            assert type(there) is RuntimeError
            assert str(there) == f"{type(cause).__name__}: {cause}"
            assert repr(there.__cause__) == "KeyError('first')"

    def test_a_failed_check_that_cannot_be_sent_says_what_it_was(self):
        class Local(Exception):
            pass

        error = CheckFailed({"values": (None, Local("odd"))})
        there = sent(error)
        assert str(there) == str(error)
        assert repr(there.failures["values"]) == "(None, RuntimeError('Local: odd'))"
        assert type(error.failures["values"][1]) is Local


def louder(module, args, output):
    return 1.5 * output


def doubled(x_t, t, labels):
    return 2 * x_t


@pytest.fixture
def unet():
    """A U-Net of diffusers with weights other than zero everywhere."""
    torch.manual_seed(1)
    made = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return made.eval().requires_grad_(False)


class TestSent:
    """By pickle, and copied."""

    def test_samplers_draw_the_same_bits(self, tiny_sampler, unet, tmp_path):
        made = tiny_sampler(backend="reference")
        made.save_pretrained(tmp_path)
        loaded = fd.Sampler.from_pretrained(tmp_path, "cpu", tables="diffusers", compile=False)
        taken = fd.Sampler.from_diffusers(unet, diffusers.DDIMScheduler(), compile=False)
        unet.conv_out.register_forward_hook(louder)
        called = fd.Sampler.from_diffusers(unet, diffusers.DDPMScheduler(), compile=False)
        assert not isinstance(called.network, fd.UNet)
        by_call = made.replace(network=louder, call=doubled, conditioning=None)
        for sampler in (made, loaded, taken, called, by_call):
            want = draw(sampler)
            for there in (sent(sampler), copy.copy(sampler), copy.deepcopy(sampler)):
                assert torch.equal(draw(there), want)
                for name in ("shape", "dtype", "device", "backend", "defaults", "conditioning"):
                    assert getattr(there, name) == getattr(sampler, name), name
                assert there.executor.choice.compile == sampler.executor.choice.compile
                assert there.scheduler_config == sampler.scheduler_config
        assert not torch.equal(draw(called), draw(taken))

    def test_weights_are_shared_by_copies_and_owned_by_deep_and_sent_ones(self, tiny_sampler):
        sampler = tiny_sampler()
        shared, deep, there = copy.copy(sampler), copy.deepcopy(sampler), sent(sampler)
        before = draw(sampler)
        state = {key: value / 2 for key, value in sampler.network.state_dict().items()}
        sampler.update_weights(state)
        after = draw(sampler)
        assert not torch.equal(after, before)
        assert shared.network is sampler.network and torch.equal(draw(shared), after)
        assert torch.equal(draw(deep), before) and torch.equal(draw(there), before)
        deep.update_weights(state)
        assert torch.equal(draw(deep), after) and torch.equal(draw(there), before)
        together = copy.deepcopy([shared, sampler])  # as one object, what they share
        assert together[0].network is together[1].network

    def test_what_was_made_on_the_way_is_not_sent(self, tiny_sampler):
        sampler = tiny_sampler()
        small = len(pickle.dumps(sampler))
        sampler.sample(range(300), 1, 2.0, num_steps=3, batch_size=300)
        assert len(pickle.dumps(sampler)) == small

    @pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
    def test_pipelines_draw_the_same_pictures(self, kind, unet):
        scheduler = diffusers.DDPMScheduler(prediction_type="sample")
        pipe = kind(fd.Sampler.from_diffusers(unet, scheduler, compile=False))
        pipe.set_progress_bar_config(disable=True)
        for noise in ({"seeds": SEEDS}, {"generator": torch.Generator()}):
            drawn = []
            for one in (pipe, sent(pipe), copy.copy(pipe), copy.deepcopy(pipe)):
                if "generator" in noise:
                    noise["generator"].manual_seed(3)
                drawn.append(one(**noise, num_inference_steps=2, output_type="pt").images)
            assert all(torch.equal(images, drawn[0]) for images in drawn)
        pipe.scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
        assert sent(pipe).scheduler == pipe.scheduler

    def test_a_refusal_says_what_to_send_instead(self, tiny_unet, tiny_sampler):
        class Local(torch.nn.Module):
            def forward(self, x_t, t):
                return x_t

        hooked = tiny_unet(num_class_embeds=4)
        hooked.conv_in.register_forward_hook(lambda module, args, output: output)
        plain = tiny_sampler()
        for name, sampler in (
            ("network", plain.replace(network=lambda x_t, t, labels: x_t)),
            ("network", plain.replace(network=Local(), conditioning=None)),
            ("network", plain.replace(network=hooked)),
            ("call", plain.replace(call=lambda x_t, t, labels: x_t)),
        ):
            for refused in (sampler, DDIMPipeline(sampler)):
                with pytest.raises(
                    TypeError, match=f"^{name}=.*cannot be pickled.* a folder"
                ) as it:
                    pickle.dumps(refused)
                assert "\n" not in str(it.value)
            assert torch.equal(draw(copy.copy(sampler)), draw(sampler))  # which needs no pickle
            assert torch.equal(draw(copy.deepcopy(sampler)), draw(sampler))
        trajectory = plain.trajectory(SEEDS)
        with fd.Engine(plain, threaded=False) as engine:
            for refused, instead in ((engine, "send its sampler"), (trajectory, r"save\(\) it")):
                for send in (pickle.dumps, copy.copy, copy.deepcopy):
                    with pytest.raises(TypeError, match=instead):
                        send(refused)

    def test_plans_stay_as_they_are(self, tiny_sampler):
        plan = tiny_sampler().plan("dpmpp_2m", 6).from_image(0.5)
        assert plan.content and not plan.fractional  # kept once they were asked for
        for there in (sent(plan), copy.copy(plan), copy.deepcopy(plan)):
            assert there.content == plan.content and there.initial == plan.initial
            assert there.abar.tolist() == plan.abar.tolist()
            for table in (there.rows, there.noise_keys, there.abar, there.timesteps):
                assert not table.flags.writeable
        made = fd.Plan(plan.rows, plan.noise_keys)
        assert sent(made).abar is None and sent(made).content == plan.content

    def test_requests_and_results_are_sent(self, tiny_sampler):
        sampler = tiny_sampler()
        request = fd.Request(seed=3, label=1, solver=sampler.plan(num_steps=2), guidance=2.0)
        with fd.Engine(sampler, 2) as engine:
            result = engine.submit(request).result(LIMIT)
            again = engine.submit(sent(request)).result(LIMIT)
        there = sent(result)
        assert torch.equal(there.image, result.image) and torch.equal(again.image, result.image)
        assert there.timings == result.timings and there.request.seed == 3
