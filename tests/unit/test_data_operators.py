"""The random choices of a sample: the same whenever they are made, independent of each other, of the right odds."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dstrain.data.media.decode import CENTRE, Place
from dstrain.data.media.operators import Operators, SampleRandom, Slot
from dstrain.errors import ConfigError
from dstrain.rng import Purpose, uniform, words

DRAWS = range(4000)
EVERYTHING = Operators(crop="random", flip=0.3, caption="random", shuffle_tags=True, keep_tags=1)
CAPTIONS = ["a, b, c, d", "e, f, g, h, i", "j"]


def choices(operators: Operators, random: SampleRandom) -> dict[str, object]:
    return {
        "place": operators.place(random),
        "flip": operators.flipped(random),
        "start": operators.start(random),
        "caption": operators.choose(CAPTIONS, random),
    }


def test_plain_integers_give_the_words_of_the_tensors() -> None:
    for seed in (0, 7, 2**64 - 1):
        for draw in (0, 1, 2**32 - 1, 2**32 + 5, 2**62):
            expected = uniform(seed, Purpose.AUGMENT, torch.tensor([draw]))
            assert torch.tensor([SampleRandom(seed, draw).uniform(Slot.PLACE_X)], dtype=torch.float32) == expected
    groups = [words(1, Purpose.AUGMENT, 5, group) for group in range(64)]
    assert len({word for group in groups for word in group}) == 256
    assert words(1, Purpose.AUGMENT, 5, 0) != words(1, Purpose.ORDER, 5, 0)


def test_numbers_lie_inside_the_unit_interval_and_are_uniform() -> None:
    numbers = [SampleRandom(3, draw).uniform(slot) for draw in range(1000) for slot in Slot]
    assert all(0 < number < 1 for number in numbers) and len(set(numbers)) > 4990
    counts = Counter(int(number * 10) for number in numbers)
    assert max(abs(count - 500) for count in counts.values()) < 110  # five standard deviations


def test_choices_are_a_function_of_seed_and_draw() -> None:
    made = [choices(EVERYTHING, SampleRandom(5, draw)) for draw in range(50)]
    assert made == [choices(EVERYTHING, SampleRandom(5, draw)) for draw in reversed(range(50))][::-1]
    assert all(a != b for a, b in pairwise(made))
    assert made != [choices(EVERYTHING, SampleRandom(6, draw)) for draw in range(50)]


def test_switching_one_operator_changes_no_choice_of_another() -> None:
    off: list[tuple[dict[str, object], set[str]]] = [
        ({"crop": "centre"}, {"place", "start"}),
        ({"flip": 0.0}, {"flip"}),
        ({"caption": "first"}, {"caption"}),
        ({"shuffle_tags": False}, {"caption"}),
    ]
    for change, concerned in off:
        other, changed = replace(EVERYTHING, **change), set()  # type: ignore[arg-type]
        for draw in range(100):
            random = SampleRandom(1, draw)
            before, after = choices(EVERYTHING, random), choices(other, random)
            changed |= {name for name in before if before[name] != after[name]}
        assert changed == concerned


def test_what_is_off_does_nothing() -> None:
    random = SampleRandom(0, 0)
    assert choices(Operators(), random) == {"place": CENTRE, "flip": False, "start": 0.0, "caption": "a, b, c, d"}
    assert Operators().choose(["  kept ,as it is,"], random) == "  kept ,as it is,"
    assert not Operators().varies_image and not Operators().varies_caption
    assert not any(Operators(flip=0.0).flipped(SampleRandom(0, draw)) for draw in DRAWS)
    assert all(Operators(flip=1.0).flipped(SampleRandom(0, draw)) for draw in DRAWS)


def test_whether_a_sample_varies() -> None:
    assert Operators(crop="random").varies_image and Operators(flip=0.1).varies_image
    assert Operators(caption="random").varies_caption and Operators(shuffle_tags=True).varies_caption
    assert not Operators(crop="random", flip=0.1).varies_caption
    assert not Operators(caption="random", shuffle_tags=True).varies_image


def test_odds() -> None:
    randoms = [SampleRandom(11, draw) for draw in DRAWS]
    assert abs(sum(map(EVERYTHING.flipped, randoms)) - 1200) < 150  # five standard deviations
    chosen = Counter(EVERYTHING.choose(["x", "y", "z", "w"], random) for random in randoms)
    assert set(chosen) == set("xyzw") and max(abs(count - 1000) for count in chosen.values()) < 140
    places = [EVERYTHING.place(random) for random in randoms]
    for numbers in ([p.x for p in places], [p.y for p in places], [EVERYTHING.start(random) for random in randoms]):
        assert abs(sum(numbers) / len(numbers) - 0.5) < 0.025 and min(numbers) < 0.01 and max(numbers) > 0.99
    correlation = torch.corrcoef(
        torch.tensor([[p.x, p.y, float(EVERYTHING.flipped(r))] for p, r in zip(places, randoms)]).T
    )
    assert (correlation - torch.eye(3)).abs().max() < 0.08


def test_every_order_of_the_tags_is_equally_likely() -> None:
    operators = Operators(shuffle_tags=True, keep_tags=2)
    seen = Counter(operators.choose(["one, two, c, d, e"], SampleRandom(2, draw)) for draw in DRAWS)
    assert len(seen) == 6 and all(text.startswith("one, two, ") for text in seen)
    assert max(abs(count - 4000 / 6) for count in seen.values()) < 120


def test_a_permutation_is_one_for_any_length() -> None:
    for count in (0, 1, 2, 3, 64, 1001):
        order = SampleRandom(0, 9).order(count)
        assert sorted(order) == list(range(count))
    assert SampleRandom(0, 9).order(1001) != list(range(1001))


@pytest.mark.parametrize(
    ("operators", "caption", "tags"),
    [
        (Operators(shuffle_tags=True), "a,b ,, c\n,", {"a", "b", "c"}),
        (Operators(shuffle_tags=True, tag_separator="|"), "a, b | c", {"a, b", "c"}),
        (Operators(shuffle_tags=True, keep_tags=9), "b, a", {"b", "a"}),
        (Operators(shuffle_tags=True), "a picture of a cat", {"a picture of a cat"}),
        (Operators(shuffle_tags=True), "猫, собака", {"猫", "собака"}),
    ],
)
def test_tags_are_none_lost_none_added(operators: Operators, caption: str, tags: set[str]) -> None:
    for draw in range(20):
        chosen = operators.choose([caption], SampleRandom(0, draw))
        parts = chosen.split(f"{operators.tag_separator} ")
        assert set(parts) == tags and len(parts) == len(tags)
    if operators.keep_tags:
        assert chosen == "b, a"


def test_a_caption_of_separators_alone_stays_as_it_is() -> None:
    assert Operators(shuffle_tags=True).choose([", ,"], SampleRandom(0, 0)) == ", ,"


@pytest.mark.parametrize(
    "options", [{"flip": -0.1}, {"flip": 1.5}, {"flip": float("nan")}, {"keep_tags": -1}, {"tag_separator": " "}]
)
def test_values_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(options)))):
        Operators(**options)  # type: ignore[arg-type]


def test_places_are_inside() -> None:
    for draw in range(100):
        place = EVERYTHING.place(SampleRandom(0, draw))
        assert isinstance(place, Place) and 0 < place.x < 1 and 0 < place.y < 1
