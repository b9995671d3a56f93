"""One reverse step: the reference's bits, near float64, and written only where it should be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm import kernels
from flashddpm.kernels import Column, Purpose, launch, reference
from flashddpm.kernels.launch import channels_last
from flashddpm.kernels.step_arguments import StepSlots, StepStatistics, by_tensor
from flashddpm.kernels.tables import FLOATS

# The interpreter computes with NumPy, which warns where Inf - Inf is tried.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

IN_PLACE = ("x", "hist", "net_in", "nonfinite")
PER_SLOT = (*StepSlots._fields, *StepStatistics._fields)
SHAPES = [
    *((1, 1, 1), (1, 1, 2), (1, 1, 3), (3, 1, 1), (1, 1, 15), (1, 1, 17), (3, 17, 17)),
    *((1, 31, 33), (1, 32, 32), (1, 25, 41), (3, 8, 8)),
]


def exact(state, slot):
    """Return x_next, x0 and the sums of the absolute terms of each, in float64."""
    args = {name: value.cpu() for name, value in state.args.items()}
    i = args["idx"][slot].item()
    c = dict(zip((column.name for column in Column), args["rows"][i].double(), strict=True))
    C = args["x"].shape[1]
    out, variance = args["out"][:, :C].double(), args["out"][:, C:].double()
    o, size = out[args["lane_cond"][slot]], out[args["lane_cond"][slot]].abs()
    if args["lane_uncond"][slot] >= 0 and not c["UNGUIDED"]:
        w, u = args["guidance"][slot].double(), out[args["lane_uncond"][slot]]
        o, size = u + w * (o - u), u.abs() + w.abs() * (o.abs() + u.abs())
        if c["RESCALE"]:
            factor = args["rescale_factor"][slot].double()
            o, size = o * factor, size * factor
    seed, key = args["seeds"][slot : slot + 1], args["keys"][i : i + 1]
    shape = tuple(args["x"].shape[1:])
    z = reference.philox(seed, key, shape, Purpose.REVERSE_STEP)[0].double()
    x, hist = state.before["x"][slot].cpu().double(), state.before["hist"][slot].cpu().double()
    x0 = c["X0_XT"] * x + c["X0_OUT"] * o
    x0_terms = c["X0_XT"].abs() * x.abs() + c["X0_OUT"].abs() * size
    if c["THRESHOLD"]:
        s = args["dynamic_threshold"][slot].double()
        x0, x0_terms = x0.clamp(-s, s) / s, x0_terms / s
    elif c["CLIP"]:
        x0 = x0.clamp(-c["CLIP"], c["CLIP"])
    exponent = torch.zeros(())
    if variance.numel():
        exponent = c["LOG_SIGMA"] * variance[args["lane_cond"][slot]]
    z = z * exponent.exp()
    x_next = c["C_X0"] * x0 + c["C_XT"] * x + c["C_OUT"] * o + c["C_HIST"] * hist + c["SIGMA"] * z
    z = z * (1 + exponent.abs())  # the exponent is rounded too
    terms = c["C_X0"].abs() * x0_terms + c["C_OUT"].abs() * size
    terms += (c["C_XT"] * x).abs() + (c["C_HIST"] * hist).abs() + (c["SIGMA"] * z).abs()
    return x_next, x0, terms, x0_terms


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(compared_step, shape, dtype):
    results = compared_step(shape=shape, dtypes=(dtype, dtype))
    assert results["x"].isfinite().all() and not results["nonfinite"].any()


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 10**6), noise=st.booleans())
def test_equals_reference_anywhere(compared_step, data, seed, noise):
    """Random rows with random zeros; slots mixed over rows, lanes and guidance."""
    number = st.sampled_from([0.0, 0.0, -0.0, 1.0, -1.0, 0.37, -2.3, 1e-3, 17.0])
    count = data.draw(st.integers(1, 3))
    columns = {column.name.lower(): number for column in Column}
    columns["clip"] = st.sampled_from([0.0, 0.5, 3.0])
    columns["threshold"] = columns["rescale"] = st.sampled_from([0.0, 0.0, 0.7])
    columns["unguided"] = st.sampled_from([0.0, 0.0, 1.0])
    table = {
        f"row {i}": data.draw(st.tuples(st.fixed_dictionaries(columns), st.integers(0, count)))
        for i in range(1, count + 1)
    }
    slots = data.draw(st.integers(1, 4))
    names = data.draw(st.lists(st.sampled_from(["idle", *table]), min_size=slots, max_size=slots))
    lanes = data.draw(st.permutations(range(8)))
    guided = data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots))
    compared_step(
        shape=data.draw(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))),
        names=names,
        cond=tuple(lanes[:slots]),
        uncond=tuple(lanes[4 + i] if guided[i] else -1 for i in range(slots)),
        dtypes=data.draw(st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS))),
        table=table,
        noise=noise,
        variance=data.draw(st.booleans()),
        seed=seed,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["fast", "reference"])
@pytest.mark.parametrize(
    "name",
    [
        *("ancestral", "second order", "stochastic", "clipped", "last", "all"),
        *("thresholded", "rescaled", "learned", "unguided"),
    ],
)
def test_near_float64(State, device, rules, name, which, dtype):
    """With float32 tables, out -> x0 -> x_next rounds 2 products and 5 sums: n = 7.

    (x0_out out, x0 + that, c_x0 x0, and the sums with c_xt, c_out, c_hist and sigma; the first
    of each sum starts from 0 and is exact. The clip moves no error apart.) Guidance adds a
    difference, a product and a sum: n = 10. The threshold adds a quotient, rescaling a product:
    one each. The learned sigma's path is exp (3), its argument, and products with sigma and z and
    one sum: 7.
    """
    state = State(
        device if which == "fast" else "cpu",
        shape=(3, 17, 17),
        names=(name, name),
        cond=(0, 1),
        uncond=(-1, 2),
        dtypes=(dtype, dtype),
        variance=name == "learned",
    )
    results = state.step(kernels.denoise_step if which == "fast" else reference.denoise_step)
    lanes = [[0], [1, 2]]
    more = int(name in ("thresholded", "rescaled"))
    for slot, n in ((0, 7 + more), (1, 10 + more)):
        x_next, x0, terms, x0_terms = exact(state, slot)
        rules.close(results["x"][slot], x_next, terms, n)
        for lane in lanes[slot]:
            rules.close(results["net_in"][lane], x_next, terms, n)
        if name not in ("stochastic", "clipped", "last", "unguided"):  # the next row reads it
            rules.close(results["hist"][slot], x0, x0_terms, n)


PASS_OUT = {"pass": ({"c_out": 1.0}, 0)}


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5, 7.5, -2.0])
def test_guidance(State, device, rules, weight):
    """An unguided slot selects; a guided one combines u + w (c - u), each operation rounded."""

    def guide(args):
        args["guidance"][:] = torch.tensor([torch.nan, weight])

    state = State(
        device,
        names=("pass", "pass"),
        cond=(0, 1),
        uncond=(-1, 2),
        table=PASS_OUT,
        change=guide,
    )
    out = state.args["out"].cpu()
    results = state.step()
    rules.same(results["x"][0], out[0])
    difference = out[1] - out[2]
    rules.same(results["x"][1], out[2] + weight * difference)
    if weight == 1:
        assert (results["x"][1] != out[1]).float().mean() > 0.1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (3, 17, 17), (1, 31, 33), (4, 8, 8)])
def test_learned_variance_equals_reference(compared_step, shape, dtype):
    """Rows with it and without, guided or not: v is the conditional lane's, never combined."""
    names = ("learned", "ancestral", "learned", "rescaled")
    compared_step(shape=shape, names=names, dtypes=(dtype, dtype), variance=True)


def test_variance_channels_are_those_of_the_conditional_lane(compared_step, rules):
    spec = {"names": ("learned", "learned"), "cond": (0, 1), "uncond": (-1, 2), "variance": True}
    plain = compared_step(**spec)

    def change(args, lane):
        args["out"][lane, 3:] += 0.5

    other = compared_step(**spec, change=lambda args: change(args, 2))
    rules.same(other["x"], plain["x"])
    conditional = compared_step(**spec, change=lambda args: change(args, 1))
    rules.same(conditional["x"][0], plain["x"][0])
    assert (conditional["x"][1] != plain["x"][1]).float().mean() > 0.9


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_variance_that_is_not_finite_is_flagged_where_it_is_read(State, compared_step, rules, bad):
    spec = {"names": ("learned", "ancestral"), "cond": (0, 1), "uncond": (-1, -1), "variance": True}
    clean = compared_step(**spec)

    def spoil(args):
        args["out"][:2, 4, 2, 3] = bad

    results = compared_step(**spec, change=spoil)
    assert results["nonfinite"].tolist() == [[*State.STEPS].index("learned"), 0]
    rules.same(results["x"][1], clean["x"][1])
    assert results["x"][0, 1, 2, 3].isfinite() == (bad == -torch.inf)  # e^-inf is 0
    results["x"][0, 1, 2, 3] = clean["x"][0, 1, 2, 3]
    rules.same(results["x"], clean["x"])


def test_thresholded_x0_is_within_one(compared_step):
    """x0 is clipped to the slot's bound and divided by it; the clip's own bound is not used."""
    spec = {"names": ("thresholded", "thresholded"), "cond": (0, 1), "uncond": (-1, -1)}

    def bounds(args):
        args["dynamic_threshold"][:] = torch.tensor([1.0, 2.5])

    results = compared_step(**spec, change=bounds)
    largest = results["hist"].abs().amax((1, 2, 3))
    assert (largest == 1).all()
    assert results["hist"][0].abs().mean() > results["hist"][1].abs().mean()


def test_an_unguided_row_selects_and_writes_both_lanes(compared_step, rules):
    """As in an unguided slot, to the bit; whatever the other lane says, NaN too."""
    spec = {"names": ("unguided", "unguided"), "cond": (0, 1), "uncond": (-1, 2)}
    alone = compared_step(**spec, change=lambda args: args["lane_uncond"].fill_(-1))

    def spoil(args):
        args["out"][2] = torch.nan

    results = compared_step(**spec, change=spoil)
    rules.same(results["x"], alone["x"])
    assert not results["nonfinite"].any()
    rules.same(results["net_in"][2], results["net_in"][1])


def test_factor_is_of_guided_slots_only(compared_step, rules):
    spec = {"names": ("rescaled", "rescaled"), "cond": (0, 1), "uncond": (-1, 2)}
    plain = compared_step(**spec)

    def halve(args):
        args["rescale_factor"] *= 0.5

    results = compared_step(**spec, change=halve)
    rules.same(results["x"][0], plain["x"][0])
    assert (results["x"][1] != plain["x"][1]).float().mean() > 0.9


def test_guidance_combines_in_float32(State, device, rules):
    state = State(
        device,
        names=("pass", "pass"),
        cond=(0, 1),
        uncond=(3, 2),
        table=PASS_OUT,
        dtypes=(torch.bfloat16, torch.float32),
    )
    out, w = state.args["out"].cpu().float(), state.args["guidance"].cpu()
    results = state.step()
    for slot, (c, u) in enumerate(((0, 3), (1, 2))):
        rules.same(results["x"][slot], out[u] + w[slot] * (out[c] - out[u]))
        rules.same(results["net_in"][u], results["net_in"][c])


def test_given_noise_equals_drawn_noise(State, device, fast_step, rules):
    state = State(device)
    noise = [
        kernels.philox(seed[None], key[None], (3, 5, 7), Purpose.REVERSE_STEP)
        for seed, key in zip(
            state.args["seeds"], state.args["keys"][state.args["idx"]], strict=True
        )
    ]
    drawn = state.step()
    for layout in (torch.channels_last, torch.contiguous_format):
        given = fast_step(
            change=lambda args, layout=layout: args.update(
                noise=torch.cat(noise).cpu().contiguous(memory_format=layout)
            )
        )
        for name in IN_PLACE:
            rules.same(given[name], drawn[name])


@pytest.mark.parametrize("block", [64, 128])
def test_independent_of_block_size(compared_step, fast_step, rules, monkeypatch, block):
    def spoil(args):
        args["out"][1, 0, 9, 19] = torch.nan  # in the last block

    spec = {"shape": (1, 10, 20), "names": ("all", "clipped"), "cond": (0, 1), "uncond": (2, -1)}
    expected = fast_step(**spec, change=spoil)
    monkeypatch.setattr(launch, "block_size", lambda n: block)
    results = compared_step(**spec, change=spoil)
    for name in IN_PLACE:
        rules.same(results[name], expected[name])
    assert results["nonfinite"].tolist() == [0, 4]


def test_output_of_any_layout(fast_step, rules):
    expected = fast_step()
    for layout in (
        lambda out: out.contiguous(),
        lambda out: out.repeat_interleave(2, 1)[:, ::2],
        lambda out: torch.cat([out[:1], out])[1:],
    ):
        results = fast_step(change=lambda args, layout=layout: args.update(out=layout(args["out"])))
        for name in IN_PLACE:
            rules.same(results[name], expected[name])


def test_one_channel_in_either_layout(fast_step, rules):
    """With C = 1 both layouts have their elements in the same order."""
    spec = {"shape": (1, 5, 7)}
    expected = fast_step(**spec)
    results = fast_step(
        **spec, change=lambda args: args.update(x=args["x"].contiguous(), hist=args["hist"].clone())
    )
    for name in IN_PLACE:
        rules.same(results[name], expected[name])


@pytest.mark.parametrize("noise", [False, True])
def test_trajectory(State, device, rules, noise):
    """Steps and advances until every slot is idle: the reference's bits all the way."""
    spec = {"names": ("ancestral", "second order", "idle", "all"), "noise": noise}
    pairs = ((State(device, **spec), kernels), (State("cpu", **spec), reference))
    visited = []
    for _ in range(6):
        results = []
        for state, ops in pairs:
            results.append(state.step(ops.denoise_step))
            by_tensor(ops.advance)(idx=state.args["idx"], next=state.args["next"])
            state.args["out"].copy_(state.args["net_in"] * 0.75)
        for name in IN_PLACE:
            rules.same(results[0][name], results[1][name])
        visited.append(pairs[0][0].args["idx"].tolist())
    assert [slots[0] for slots in visited] == [2, 3, 4, 5, 6, 6]
    assert [slots[3] for slots in visited] == [3, 4, 5, 6, 6, 6]


def test_zero_slots(State, device):
    state = State(device)
    for name in ("x", "hist", "nonfinite", *PER_SLOT):
        state.args[name] = state.args[name][:0]
    by_tensor(kernels.denoise_step)(**state.args)
    by_tensor(reference.denoise_step)(**state.args)
    assert torch.equal(state.args["net_in"], state.before["net_in"])


def overlapping(images):
    return torch.zeros(200).as_strided(images.shape, (8, 1, 21, 3))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x: x.contiguous()),
        ("x", lambda x: x.half()),
        ("x", lambda x: x[0]),
        ("x", overlapping),
        ("hist", lambda x: x.contiguous()),
        ("hist", lambda x: x.bfloat16()),
        ("hist", lambda x: x[:1]),
        ("net_in", lambda x: x.contiguous()),
        ("net_in", lambda x: x.double()),
        ("net_in", lambda x: channels_last(x.repeat_interleave(2, 0))[::2]),
        ("net_in", lambda x: x[:, :, :1].contiguous(memory_format=torch.channels_last)),
        ("out", lambda x: x[:1]),
        ("out", lambda x: x.double()),
        ("idx", lambda x: x.int()),
        ("idx", lambda x: x[:1]),
        ("seeds", lambda x: x[:, None]),
        ("seeds", lambda x: x.double()),
        ("guidance", lambda x: x.double()),
        ("lane_cond", lambda x: x.long()),
        ("lane_uncond", lambda x: x.repeat_interleave(2)[::2]),
        ("nonfinite", lambda x: x.long()),
        ("rows", lambda x: x[:, :8].contiguous()),
        ("rows", lambda x: x.double()),
        ("keys", lambda x: x[1:]),
        ("keys", lambda x: x.int()),
        ("next", lambda x: x[1:]),
        ("next", lambda x: x.int()),
        ("dynamic_threshold", lambda x: x[:1]),
        ("dynamic_threshold", lambda x: x.double()),
        ("rescale_factor", lambda x: x[:, None]),
        ("out", lambda x: x.repeat(1, 3, 1, 1)),
        ("noise", lambda x: x[:1]),
        ("noise", lambda x: x.half()),
    ],
)
def test_bad_arguments(State, name, change):
    args = State("cpu", noise=True).args
    if name == "net_in" and change(args[name]).shape != args[name].shape:
        args["out"] = change(args["out"])
    before = args["x"].clone()
    with pytest.raises(ValueError, match=f"^{name}"):
        by_tensor(kernels.denoise_step)(**(args | {name: change(args[name])}))
    assert torch.equal(args["x"], before)
