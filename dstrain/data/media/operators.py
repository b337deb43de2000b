"""The random choices of a sample: where it is cut, whether it is mirrored, which caption, in which order its tags.

Each is a pure function of (seed, draw), as everything random is here (`dstrain.rng`). What is chosen has a number of
its own, so that switching one operator on changes nothing that another chooses.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from dstrain.data.media.decode import CENTRE, Place
from dstrain.errors import ConfigError
from dstrain.rng import Purpose, words

_TAG_GROUPS = 1 << 16  # counters from here on sort tags; slots lie below


class Slot(IntEnum):
    """What is chosen; append only, because a number that changes changes every choice."""

    PLACE_X = 0
    PLACE_Y = 1
    FLIP = 2
    CAPTION = 3
    START = 4


@dataclass(frozen=True, slots=True)
class SampleRandom:
    """The random numbers of one draw, the running number of a sample in the global order."""

    seed: int
    draw: int

    def uniform(self, slot: Slot) -> float:
        """Return the number in (0, 1) of a slot."""
        return ((words(self.seed, Purpose.AUGMENT, self.draw, slot)[0] >> 9) + 0.5) * 2.0**-23

    def order(self, count: int) -> list[int]:
        """Return a permutation of range(count), below 2^32: the order of one 64-bit word for each."""
        keys = []
        for group in range((count + 1) // 2):
            a, b, c, d = words(self.seed, Purpose.AUGMENT, self.draw, _TAG_GROUPS + group)
            keys += [a << 32 | b, c << 32 | d]
        return sorted(range(count), key=keys.__getitem__)


@dataclass(frozen=True)
class Operators:
    """What is done to every sample at random. All files of a sample are cut at the same place and mirrored together.

    crop: where the window lies in what is cut away. flip: probability of mirroring, left to right.
    caption: which one of several. shuffle_tags: permute the parts of a caption between `tag_separator`, all but the
    first `keep_tags`. Dropping captions is the pipeline's.
    Raises ConfigError for values that mean nothing.
    """

    crop: Literal["centre", "random"] = "centre"
    flip: float = 0.0
    caption: Literal["first", "random"] = "first"
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_separator: str = ","

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip = {self.flip} is a probability; give 0 to 1")
        if self.keep_tags < 0:
            raise ConfigError(f"keep_tags = {self.keep_tags} is a number of tags; give 0 or more")
        if not self.tag_separator.strip():
            raise ConfigError("tag_separator is empty; give the character between tags, as ','")

    def check_fixed(self) -> None:
        """Raise ConfigError if anything of a sample differs from draw to draw, so that it cannot be encoded once."""
        told = {
            "crop: random": self.crop == "random",
            f"flip: {self.flip:g}": self.flip > 0,
            "caption: random": self.caption == "random",
            "shuffle_tags: true": self.shuffle_tags,
        }
        if random := [f"data.{key}" for key, there in told.items() if there]:
            raise ConfigError(
                f"{' and '.join(random)} would choose anew for every draw, which samples that are encoded once cannot"
                " follow; leave that out, or train on the pictures themselves"
            )

    @property
    def varies_image(self) -> bool:
        """Whether the pixels of a sample differ from draw to draw, so that what is encoded once cannot be kept."""
        return self.crop == "random" or self.flip > 0

    @property
    def varies_caption(self) -> bool:
        """Whether the caption of a sample differs from draw to draw."""
        return self.caption == "random" or self.shuffle_tags

    def place(self, random: SampleRandom) -> Place:
        """Choose where the window lies."""
        if self.crop == "centre":
            return CENTRE
        return Place(random.uniform(Slot.PLACE_X), random.uniform(Slot.PLACE_Y))

    def flipped(self, random: SampleRandom) -> bool:
        """Choose whether the sample is mirrored."""
        return random.uniform(Slot.FLIP) < self.flip

    def start(self, random: SampleRandom) -> float:
        """Choose where a clip begins in its video, in [0, 1): the first frame, or at random as the window."""
        return 0.0 if self.crop == "centre" else random.uniform(Slot.START)

    def choose(self, captions: list[str], random: SampleRandom) -> str:
        """Choose one of the captions, at least one, and the order of its tags."""
        caption = captions[0]
        if self.caption == "random":
            caption = captions[int(random.uniform(Slot.CAPTION) * len(captions))]
        if not self.shuffle_tags:
            return caption
        tags = [tag for part in caption.split(self.tag_separator) if (tag := part.strip())]
        if not tags:
            return caption  # never nothing where there was something
        kept, rest = tags[: self.keep_tags], tags[self.keep_tags :]
        return f"{self.tag_separator} ".join([*kept, *(rest[place] for place in random.order(len(rest)))])
