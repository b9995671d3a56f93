"""One reverse step: the reference's bits, near float64, and written only where it should be."""

import functools
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm import kernels
from flashddpm.kernels import Column, Purpose, reference
from flashddpm.kernels.launch import FLOATS

module = importlib.import_module("flashddpm.kernels.denoise_step")
# The interpreter computes with NumPy, which warns where Inf - Inf is tried.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

IN_PLACE = ("x", "hist", "net_in", "nonfinite")
SHAPES = [
    *((1, 1, 1), (1, 1, 2), (1, 1, 3), (3, 1, 1), (1, 1, 15), (1, 1, 17), (3, 17, 17)),
    *((1, 31, 33), (1, 32, 32), (1, 25, 41), (3, 8, 8)),
]


def row(**columns):
    return [columns.get(column.name.lower(), 0.0) for column in Column]


# name: (row, the row that follows)
TABLE = {
    "rest": (row(), 0),
    "ancestral": (row(x0_xt=1.3, x0_out=-0.8, clip=1.0, c_x0=0.3, c_xt=0.68, sigma=0.2), 2),
    "second order": (row(x0_xt=1.3, x0_out=-0.8, c_x0=0.55, c_xt=0.6, c_hist=-0.15), 3),
    "stochastic": (row(x0_out=1.0, c_x0=0.5, c_xt=0.4, c_hist=-0.1, sigma=0.3), 4),
    "clipped": (row(x0_xt=0.8, x0_out=-0.6, clip=0.7, c_x0=0.9, c_out=0.4), 5),
    "last": (row(x0_xt=1.1, x0_out=-0.5, c_x0=1.0), 6),
    "finished": (row(x0_xt=1.0, x0_out=1.0, c_x0=1.0, c_xt=1.0, sigma=1.0), 6),
    "all": (row(x0_xt=1.2, x0_out=-0.9, c_x0=0.4, c_xt=0.5, c_out=0.1, c_hist=-0.2, sigma=0.3), 3),
}
NAMES = list(TABLE)


class State:
    """Arguments on a device, with red zones around every buffer that is changed in place."""

    def __init__(
        self,
        guarded,
        device,
        shape=(3, 5, 7),
        names=("ancestral", "second order", "clipped", "all"),
        uncond=(-1, 5, -1, 4),
        cond=(2, 0, 3, 1),
        dtypes=(torch.float32, torch.float32),
        table=TABLE,
        noise=False,
        seed=0,
        change=None,
    ):
        draws = torch.Generator().manual_seed(seed)
        slots, lanes = len(names), max(*cond, *uncond) + 2  # the last lane is nobody's
        rows, follow = zip(*table.values(), strict=True)

        def images(count, dtype=torch.float32):
            return torch.randn((count, *shape), generator=draws).to(dtype)

        n = images(1).numel()
        self.zones = {
            "x": guarded(images(slots), -(-n // 16) * 16 + 16, device),
            "hist": guarded(images(slots), -(-n // 16) * 16 + 32, device),
            "net_in": guarded(images(lanes, dtypes[1]), n, device),
        }
        self.args = {name: zone.view for name, zone in self.zones.items()} | {
            "nonfinite": torch.zeros(slots, dtype=torch.int32),
            "out": images(lanes, dtypes[0]).contiguous(memory_format=torch.channels_last),
            "idx": torch.tensor([list(table).index(name) for name in names]),
            "seeds": torch.randint(-(2**63), 2**63 - 1, (slots,), generator=draws),
            "guidance": torch.rand(slots, generator=draws) * 4,
            "lane_cond": torch.tensor(cond[:slots], dtype=torch.int32),
            "lane_uncond": torch.tensor(uncond[:slots], dtype=torch.int32),
            "rows": torch.tensor(rows),
            "keys": torch.randint(0, 2**40, (len(rows),), generator=draws),
            "next": torch.tensor(follow),
        }
        if noise:
            self.args["noise"] = images(slots).contiguous(memory_format=torch.channels_last)
        if change:
            change(self.args)
        for name, value in self.args.items():
            if name not in self.zones:
                self.args[name] = value.to(device)
        self.before = {name: self.args[name].clone() for name in IN_PLACE}

    def step(self, step=kernels.denoise_step):
        """Apply the step; return its results on the CPU."""
        assert step(**self.args) is None
        for zone in self.zones.values():
            zone.check()
        return {name: self.args[name].cpu() for name in IN_PLACE}


@pytest.fixture(scope="module")
def new_state(guarded):
    return functools.partial(State, guarded)


@pytest.fixture(scope="module")
def fast(new_state, device):
    """What State takes -> the results of the kernel."""
    return lambda **spec: new_state(device, **spec).step()


@pytest.fixture(scope="module")
def compare(new_state, device, rules):
    """What State takes -> the results of the kernel, once they equal the reference's."""

    def compare(**spec):
        results = new_state(device, **spec).step()
        expected = new_state("cpu", **spec).step(reference.denoise_step)
        for name in IN_PLACE:
            rules.same(results[name], expected[name], truncates=True)
        return results

    return compare


def exact(state, slot):
    """Return x_next, x0 and the sums of the absolute terms of each, in float64."""
    args = {name: value.cpu() for name, value in state.args.items()}
    i = args["idx"][slot].item()
    c = dict(zip((column.name for column in Column), args["rows"][i].double(), strict=True))
    out = args["out"].double()
    o, size = out[args["lane_cond"][slot]], out[args["lane_cond"][slot]].abs()
    if args["lane_uncond"][slot] >= 0:
        w, u = args["guidance"][slot].double(), out[args["lane_uncond"][slot]]
        o, size = u + w * (o - u), u.abs() + w.abs() * (o.abs() + u.abs())
    seed, key = args["seeds"][slot : slot + 1], args["keys"][i : i + 1]
    shape = tuple(args["x"].shape[1:])
    z = reference.philox(seed, key, shape, Purpose.REVERSE_STEP)[0].double()
    x, hist = state.before["x"][slot].cpu().double(), state.before["hist"][slot].cpu().double()
    x0 = c["X0_XT"] * x + c["X0_OUT"] * o
    x0_terms = c["X0_XT"].abs() * x.abs() + c["X0_OUT"].abs() * size
    if c["CLIP"]:
        x0 = x0.clamp(-c["CLIP"], c["CLIP"])
    x_next = c["C_X0"] * x0 + c["C_XT"] * x + c["C_OUT"] * o + c["C_HIST"] * hist + c["SIGMA"] * z
    terms = c["C_X0"].abs() * x0_terms + c["C_OUT"].abs() * size
    terms += (c["C_XT"] * x).abs() + (c["C_HIST"] * hist).abs() + (c["SIGMA"] * z).abs()
    return x_next, x0, terms, x0_terms


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(compare, shape, dtype):
    results = compare(shape=shape, dtypes=(dtype, dtype))
    assert results["x"].isfinite().all() and not results["nonfinite"].any()


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 10**6), noise=st.booleans())
def test_equals_reference_anywhere(compare, data, seed, noise):
    """Random rows with random zeros; slots mixed over rows, lanes and guidance."""
    number = st.sampled_from([0.0, 0.0, -0.0, 1.0, -1.0, 0.37, -2.3, 1e-3, 17.0])
    count = data.draw(st.integers(1, 3))
    table = {"rest": TABLE["rest"]}
    for i in range(1, count + 1):
        columns = data.draw(st.lists(number, min_size=9, max_size=9))
        columns[Column.CLIP] = data.draw(st.sampled_from([0.0, 0.5, 3.0]))
        table[str(i)] = columns, data.draw(st.integers(0, count))
    slots = data.draw(st.integers(1, 4))
    names = data.draw(st.lists(st.sampled_from(list(table)), min_size=slots, max_size=slots))
    lanes = data.draw(st.permutations(range(8)))
    guided = data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots))
    compare(
        shape=data.draw(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))),
        names=names,
        cond=tuple(lanes[:slots]),
        uncond=tuple(lanes[4 + i] if guided[i] else -1 for i in range(slots)),
        dtypes=data.draw(st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS))),
        table=table,
        noise=noise,
        seed=seed,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["fast", "reference"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("rest", "finished")])
def test_near_float64(new_state, device, rules, name, which, dtype):
    """With float32 tables, out -> x0 -> x_next rounds 2 products and 5 sums: n = 7.

    (x0_out out, x0 + that, c_x0 x0, and the sums with c_xt, c_out, c_hist and sigma; the first
    of each sum starts from 0 and is exact. The clip moves no error apart.) Guidance adds a
    difference, a product and a sum: n = 10.
    """
    state = new_state(
        device if which == "fast" else "cpu",
        shape=(3, 17, 17),
        names=(name, name),
        cond=(0, 1),
        uncond=(-1, 2),
        dtypes=(dtype, dtype),
    )
    results = state.step(kernels.denoise_step if which == "fast" else reference.denoise_step)
    lanes = [[0], [1, 2]]
    for slot, n in ((0, 7), (1, 10)):
        x_next, x0, terms, x0_terms = exact(state, slot)
        rules.close(results["x"][slot], x_next, terms, n)
        for lane in lanes[slot]:
            rules.close(results["net_in"][lane], x_next, terms, n)
        if TABLE[NAMES[TABLE[name][1]]][0][Column.C_HIST]:
            rules.close(results["hist"][slot], x0, x0_terms, n)


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_idle_and_finished_slots_are_never_written(new_state, device, rules, which):
    """Whatever their lanes hold, and even if they have none."""

    def spoil(args):
        args["out"][1:3] = torch.nan
        args["lane_cond"][2] = -1

    state = new_state(
        device if which == "fast" else "cpu",
        names=("ancestral", "rest", "rest", "finished"),
        cond=(0, 1, 2, 2),
        uncond=(-1, -1, -1, 3),
        change=spoil,
    )
    results = state.step(kernels.denoise_step if which == "fast" else reference.denoise_step)
    for name in ("x", "hist", "nonfinite"):
        rules.same(results[name][1:], state.before[name][1:])
    rules.same(results["net_in"][1:], state.before["net_in"][1:])
    assert (results["x"][0] != state.before["x"][0].cpu()).any()


def test_lanes_of_no_slot_are_never_written(new_state, device, rules):
    state = new_state(device, names=("ancestral", "last"), cond=(4, 1), uncond=(2, -1))
    results = state.step()
    for lane in (0, 3, 5):
        rules.same(results["net_in"][lane], state.before["net_in"][lane])
    for lane, slot in ((4, 0), (2, 0), (1, 1)):
        rules.same(results["net_in"][lane], results["x"][slot])


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 2, 1, 0]])
def test_permuted_slots_give_permuted_results(fast, rules, order):
    def permute(args):
        for name in ("x", "hist"):
            args[name].copy_(args[name][order].clone())
        for name in ("nonfinite", "idx", "seeds", "guidance", "lane_cond", "lane_uncond"):
            args[name] = args[name][order]

    plain, permuted = fast(), fast(change=permute)
    for name in ("x", "hist", "nonfinite"):
        rules.same(permuted[name], plain[name][order])
    rules.same(permuted["net_in"], plain["net_in"])


def test_slots_are_independent(fast, rules):
    """A slot alone gives the bits that it gives among others."""
    together = fast()
    for slot in range(4):

        def alone(args, slot=slot):
            for name in ("nonfinite", "idx", "seeds", "guidance", "lane_cond", "lane_uncond"):
                args[name] = args[name][slot : slot + 1]
            for name in ("x", "hist"):
                args[name] = args[name][slot : slot + 1]

        result = fast(change=alone)
        rules.same(result["x"], together["x"][slot : slot + 1])
        rules.same(result["hist"], together["hist"][slot : slot + 1])


PASS_OUT = {"rest": TABLE["rest"], "pass": (row(c_out=1.0), 0)}


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5, 7.5, -2.0])
def test_guidance(new_state, device, rules, weight):
    """An unguided slot selects; a guided one combines u + w (c - u), each operation rounded."""

    def guide(args):
        args["guidance"][:] = torch.tensor([torch.nan, weight])

    state = new_state(
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


def test_guidance_combines_in_float32(new_state, device, rules):
    state = new_state(
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


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_history_is_written_only_where_the_next_row_reads_it(new_state, device, rules, which):
    names = ("ancestral", "second order", "clipped", "last")  # followed by 2, 3, 5, 6
    state = new_state(device if which == "fast" else "cpu", names=names)
    results = state.step(kernels.denoise_step if which == "fast" else reference.denoise_step)
    written = (results["hist"] != state.before["hist"].cpu()).flatten(1).any(1)
    assert written.tolist() == [True, True, False, False]
    assert results["hist"][0].abs().max() <= 1  # x0 after the clip
    assert (results["hist"][0].abs() == 1).any()


@pytest.mark.parametrize("which", ["fast", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_flag_names_the_row_of_each_slot(new_state, device, bad, which):
    """Before the clip, which would hide Inf; per slot; and never after it is set."""

    def spoil(args):
        args["out"][3, 2, 4, 6] = bad  # the last element of slot 2, of a clipped row
        args["out"][5, 0, 0, 0] = bad  # the unconditional lane of slot 1

    state = new_state(device if which == "fast" else "cpu", change=spoil)
    step = kernels.denoise_step if which == "fast" else reference.denoise_step
    results = state.step(step)
    assert results["nonfinite"].tolist() == [0, 2, 4, 0]
    state.args["idx"].fill_(NAMES.index("ancestral"))
    assert state.step(step)["nonfinite"].tolist() == [0, 2, 4, 0]
    state.args["out"].fill_(bad)
    assert state.step(step)["nonfinite"].tolist() == [1, 2, 4, 1]


def test_flag_of_a_combination_that_overflows(compare):
    def spoil(args):
        args["out"][0], args["out"][5], args["guidance"][:] = 3e38, -3e38, 1.0

    assert compare(change=spoil)["nonfinite"].tolist() == [0, 2, 0, 0]


def test_flag_of_a_finite_combination_stays(compare):
    def extreme(args):
        args["out"][:] = torch.finfo(torch.float32).max

    assert compare(change=extreme)["nonfinite"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("source", ["x", "out", "hist", "noise"])
def test_nonfinite_values_stay_where_they_are(compare, rules, source, bad):
    """In that sample only, and NaN passes the clip; out's place in a guided slot included."""
    spec = {"names": ("all",) * 4, "noise": True}
    clean = compare(**spec)
    lane = {"out": 1}.get(source, 3)  # slot 3 reads lane 1

    def spoil(args):
        args[source][lane, 2, 3, 4] = bad

    results = compare(**spec, change=spoil)
    assert not results["x"][3, 2, 3, 4].isfinite()
    assert not results["net_in"][[1, 4], 2, 3, 4].isfinite().any()
    results["x"][3, 2, 3, 4] = clean["x"][3, 2, 3, 4]
    results["net_in"][[1, 4], 2, 3, 4] = clean["net_in"][[1, 4], 2, 3, 4]
    rules.same(results["x"], clean["x"])
    rules.same(results["net_in"], clean["net_in"])


def test_nan_passes_the_clip(compare):
    def spoil(args):
        args["x"][0, 0, 0, 0] = torch.nan
        args["out"][3, 1, 1, 1] = torch.inf

    results = compare(names=("ancestral", "last", "clipped", "last"), change=spoil)
    assert results["hist"][0, 0, 0, 0].isnan() and results["x"][0, 0, 0, 0].isnan()
    assert results["x"].isnan().sum() == 1


WITHOUT = {
    "x": row(x0_out=1.0, c_x0=0.5, c_out=0.5, c_hist=0.3, sigma=0.2),
    "out": row(x0_xt=1.0, c_x0=0.5, c_xt=0.5, c_hist=0.3, sigma=0.2),
    "hist": row(x0_xt=1.0, x0_out=0.2, c_x0=0.5, c_xt=0.5, sigma=0.2),
    "noise": row(x0_xt=1.0, x0_out=0.2, c_x0=0.5, c_xt=0.5, c_hist=0.2),
    "x0": row(x0_xt=1.0, x0_out=0.2, c_xt=0.5, c_hist=0.2),
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("source", ["x", "out", "hist", "noise"])
def test_zero_coefficient_ignores_nan(compare, rules, source, bad):
    """Nothing of a term whose coefficient is 0, or -0, reaches the sum; out's flag still rises."""
    for zero in (0.0, -0.0):
        values = [value or zero for value in WITHOUT[source]]
        table = {"rest": TABLE["rest"], "without": (values, 0)}
        spec = {"names": ("without",), "table": table, "noise": True, "cond": (0,), "uncond": (-1,)}
        clean = compare(**spec)

        def spoil(args):
            args[source][:] = bad

        results = compare(**spec, change=spoil)
        rules.same(results["x"], clean["x"])
        rules.same(results["net_in"][0], clean["net_in"][0])
        assert results["x"].isfinite().all()
        assert results["nonfinite"].tolist() == [int(source == "out")]


def test_an_unused_x0_that_overflows_is_ignored(compare):
    """c_x0 = 0: x0 is not added, were it infinite."""

    def large(args):
        args["x"][:] = 2e38
        args["rows"][1, Column.X0_XT] = 100.0

    table = {"rest": TABLE["rest"], "without": (WITHOUT["x0"], 0)}
    results = compare(names=("without",), table=table, cond=(0,), uncond=(-1,), change=large)
    assert results["x"].isfinite().all()


def test_results_do_not_depend_on_what_the_buffers_held(fast, rules):
    """net_in is written whole at the slots' lanes; hist too, where no row reads it."""
    spec = {"names": ("ancestral", "ancestral"), "cond": (0, 1), "uncond": (-1, 2)}

    def nan(args):
        args["net_in"][:] = torch.nan
        args["hist"][:] = torch.nan

    clean, results = fast(**spec), fast(**spec, change=nan)
    rules.same(results["x"], clean["x"])
    rules.same(results["hist"], clean["hist"])
    rules.same(results["net_in"][:3], clean["net_in"][:3])


def test_given_noise_equals_drawn_noise(new_state, device, fast, rules):
    state = new_state(device)
    noise = [
        kernels.philox(seed[None], key[None], (3, 5, 7), Purpose.REVERSE_STEP)
        for seed, key in zip(
            state.args["seeds"], state.args["keys"][state.args["idx"]], strict=True
        )
    ]
    drawn = state.step()
    for layout in (torch.channels_last, torch.contiguous_format):
        given = fast(
            change=lambda args, layout=layout: args.update(
                noise=torch.cat(noise).cpu().contiguous(memory_format=layout)
            )
        )
        for name in IN_PLACE:
            rules.same(given[name], drawn[name])


@pytest.mark.parametrize("block", [64, 128])
def test_independent_of_block_size(compare, fast, rules, monkeypatch, block):
    def spoil(args):
        args["out"][1, 0, 9, 19] = torch.nan  # in the last block

    spec = {"shape": (1, 10, 20), "names": ("all", "clipped"), "cond": (0, 1), "uncond": (2, -1)}
    expected = fast(**spec, change=spoil)
    monkeypatch.setattr(module, "block_size", lambda n: block)
    results = compare(**spec, change=spoil)
    for name in IN_PLACE:
        rules.same(results[name], expected[name])
    assert results["nonfinite"].tolist() == [0, 4]


def test_output_of_any_layout(fast, rules):
    expected = fast()
    for layout in (
        lambda out: out.contiguous(),
        lambda out: out.repeat_interleave(2, 1)[:, ::2],
        lambda out: torch.cat([out[:1], out])[1:],
    ):
        results = fast(change=lambda args, layout=layout: args.update(out=layout(args["out"])))
        for name in IN_PLACE:
            rules.same(results[name], expected[name])


def test_one_channel_in_either_layout(fast, rules):
    """With C = 1 both layouts have their elements in the same order."""
    spec = {"shape": (1, 5, 7)}
    expected = fast(**spec)
    results = fast(
        **spec, change=lambda args: args.update(x=args["x"].contiguous(), hist=args["hist"].clone())
    )
    for name in IN_PLACE:
        rules.same(results[name], expected[name])


@pytest.mark.parametrize("noise", [False, True])
def test_trajectory(new_state, device, rules, noise):
    """Steps and advances until every slot rests: the reference's bits all the way."""
    spec = {"names": ("ancestral", "second order", "rest", "all"), "noise": noise}
    pairs = ((new_state(device, **spec), kernels), (new_state("cpu", **spec), reference))
    visited = []
    for _ in range(6):
        results = []
        for state, ops in pairs:
            results.append(state.step(ops.denoise_step))
            ops.advance(state.args["idx"], state.args["next"])
            state.args["out"].copy_(state.args["net_in"].sin())
        for name in IN_PLACE:
            rules.same(results[0][name], results[1][name])
        visited.append(pairs[0][0].args["idx"].tolist())
    assert [slots[0] for slots in visited] == [2, 3, 4, 5, 6, 6]
    assert [slots[3] for slots in visited] == [3, 4, 5, 6, 6, 6]


def test_zero_slots(new_state, device):
    state = new_state(device)
    for name in ("x", "hist", "nonfinite", "idx", "seeds", "guidance", "lane_cond", "lane_uncond"):
        state.args[name] = state.args[name][:0]
    kernels.denoise_step(**state.args)
    reference.denoise_step(**state.args)
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
        ("noise", lambda x: x[:1]),
        ("noise", lambda x: x.half()),
    ],
)
def test_bad_arguments(new_state, name, change):
    args = new_state("cpu", noise=True).args
    if name == "net_in" and change(args[name]).shape != args[name].shape:
        args["out"] = change(args["out"])
    before = args["x"].clone()
    with pytest.raises(ValueError, match=f"^{name}"):
        kernels.denoise_step(**(args | {name: change(args[name])}))
    assert torch.equal(args["x"], before)
