"""Units and their graph: declarations, wiring, running, and the split by what is trained."""

import pytest
import torch

from dstrain import rng
from dstrain.errors import DataError
from dstrain.pipelines import PIPELINES
from dstrain.pipelines.graph import UnitGraph
from dstrain.pipelines.unit import Unit
from dstrain.pipelines.units import CheckShape, DropPrompt


class Double(Unit):
    inputs = ("number",)
    outputs = ("double",)

    def __call__(self, pipeline, number):
        return {"double": [2 * n for n in number]}


class Total(Unit):
    inputs = ("number", "double")
    outputs = ("total",)
    models = ("adder",)

    def __call__(self, pipeline, number, double):
        return {"total": [pipeline + a + b for a, b in zip(number, double)]}


def test_units_run_in_order_and_keep_what_was_given():
    graph = UnitGraph([Double(), Total()], ("number", "key"))
    batch = {"number": [1, 2], "key": ["a", "b"]}
    assert graph.run(10, batch) == {"number": [1, 2], "key": ["a", "b"], "double": [2, 4], "total": [13, 16]}
    assert batch == {"number": [1, 2], "key": ["a", "b"]}


@pytest.mark.parametrize("field", ["inputs", "outputs", "models"])
@pytest.mark.parametrize("value", ["number", ["number"], ("number", 1), None])
def test_names_must_be_tuples_when_the_class_is_made(field, value):
    names = {"inputs": (), "outputs": ("y",), "models": (), field: value}
    with pytest.raises(TypeError, match=rf"Wrong\.{field} must be a tuple of names"):
        type("Wrong", (Unit,), {**names, "__call__": lambda self, pipeline: {}})


def test_call_must_take_the_declared_inputs():
    with pytest.raises(TypeError, match=r"takes \('nubmer',\), but its inputs are \('number',\)"):

        class Wrong(Unit):
            inputs = ("number",)
            outputs = ("y",)

            def __call__(self, pipeline, nubmer):
                return {"y": nubmer}


@pytest.mark.parametrize(
    ("units", "given", "says"),
    [
        ([Total(), Double()], ("number",), r"Total needs 'double', which is neither given nor produced by an earlier"),
        ([Double()], ("numbers",), r"Double needs 'number'.*did you mean 'numbers'\?"),
        ([Double(), Double()], ("number",), r"Double produces 'double', which comes from Double already"),
        ([Double()], ("number", "double"), r"Double produces 'double', which comes from the caller already"),
    ],
)
def test_wiring_is_checked_when_the_graph_is_built(units, given, says):
    with pytest.raises(ValueError, match=says):
        UnitGraph(units, given)


def test_given_must_be_a_tuple():
    with pytest.raises(TypeError, match="given must be a tuple"):
        UnitGraph([], "image")


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"nunber": [1]}, r"no 'number', which Double needs, did you mean 'nunber'\? \(it has: nunber\)"),
        ({"number": [1, 2], "key": ["a"]}, r"one entry a sample in every list, got \{'number': 2, 'key': 1\}"),
        ({"number": [1], "double": [3]}, r"brings 'double', which Double would overwrite"),
    ],
)
def test_bad_batches_are_refused_before_any_unit_runs(batch, says):
    with pytest.raises(DataError, match=says):
        UnitGraph([Double(), Total()], ("number",)).run(None, batch)


@pytest.mark.parametrize(
    ("returns", "says"),
    [
        ({}, r"Liar returned \[\], but declares \['y'\]"),
        ({"y": [1, 2], "z": [1, 2]}, r"Liar returned \['y', 'z'\], but declares \['y'\]"),
        ({"y": [1]}, r"Liar returned a list of 1 for 'y'; it needs a list of 2"),
        ({"y": (1, 2)}, r"Liar returned tuple for 'y'"),
        ({"y": torch.zeros(2)}, r"Liar returned Tensor for 'y'"),
    ],
)
def test_a_unit_must_return_what_it_declares(returns, says):
    class Liar(Unit):
        inputs = ("number",)
        outputs = ("y",)

        def __call__(self, pipeline, number):
            return returns

    with pytest.raises(ValueError, match=says):
        UnitGraph([Liar()], ("number",)).run(None, {"number": [1, 2]})


def names(units):
    return [type(u).__name__ for u in units]


def test_split_follows_trained_models_downstream():
    class Third(Unit):
        inputs = ("total",)
        outputs = ("third",)

        def __call__(self, pipeline, total): ...

    graph = UnitGraph([Double(), Total(), Third()], ("number",))
    assert [names(part) for part in graph.depends_on({"adder"})] == [["Double"], ["Total", "Third"]]
    assert [names(part) for part in graph.depends_on({"other"})] == [["Double", "Total", "Third"], []]
    assert [names(part) for part in graph.depends_on(set(), frozenset({"number"}))] == [[], names(graph.units)]


@pytest.mark.parametrize(
    ("trained", "live"),
    [
        ({"transformer"}, ["DropPrompt"]),  # chosen anew for each draw
        ({"text_encoder"}, ["EncodePrompt", "EncodeNullPrompt", "DropPrompt"]),
        ({"vae", "transformer"}, ["EncodeImage", "DropPrompt"]),
    ],
)
def test_split_of_qwen_image_for_pre_encoding(trained, live):
    family = PIPELINES.get("qwen_image")
    graph = family(torch.device("cpu")).graph
    stored, left = graph.depends_on(trained)
    assert names(left) == live
    assert names(stored) == [n for n in names(graph.units) if n not in live]
    outputs = tuple(name for unit in stored for name in unit.outputs)
    UnitGraph(left, (*family.given, *outputs))  # what is stored is enough to go on


def picture(height, width, **kwargs):
    return torch.zeros(3, height, width, dtype=kwargs.get("dtype", torch.uint8))


def test_check_shape_tells_sizes():
    assert CheckShape()(None, image=[picture(16, 48), picture(64, 32)]) == {"height": [16, 64], "width": [48, 32]}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (picture(24, 32), r"sample 1 of the batch: the picture is 24 x 32 pixels .* multiples of 16"),
        (picture(32, 40), r"32 x 40"),
        (picture(0, 32), r"0 x 32"),
        (picture(32, 32, dtype=torch.float32), r"sample 1 of the batch.*uint8 \[3, H, W\].*float32"),
        (picture(32, 32)[:1], r"\[1, 32, 32\]"),
        (picture(32, 32)[None], r"\[1, 3, 32, 32\]"),
    ],
)
def test_check_shape_names_the_sample_and_its_size(bad, says):
    with pytest.raises(DataError, match=says):
        CheckShape()(None, image=[picture(16, 16), bad])


def dropped(probability, seed, draws):
    unit = DropPrompt(probability, seed)
    prompt, null = torch.ones(5, 4), torch.zeros(2, 4)
    out = unit(None, prompt_embeds=[prompt] * len(draws), null_embeds=[null] * len(draws), draw=draws)
    return [len(e) == 2 for e in out["condition_embeds"]]


def test_caption_dropout_has_its_probability_and_only_the_draw_decides():
    draws = list(range(4000))
    every = dropped(0.1, 3, draws)
    assert 0.08 < sum(every) / len(every) < 0.12
    assert dropped(0.1, 3, draws[::-7]) == every[::-7]
    assert dropped(0.1, 4, draws) != every
    assert not any(dropped(0.0, 3, draws))
    assert all(dropped(1.0, 3, draws))
    coins = rng.uniform(3, rng.Purpose.CAPTION_DROPOUT, torch.tensor(draws))  # not the timestep's, which would tie both
    assert every == (coins < 0.1).tolist()
    more = dropped(0.3, 3, draws)
    assert all(m for e, m in zip(every, more) if e)
