"""The rows of all shards: which are used, what they cost, and how sources go together."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import SIZES, mixed_dataset, picture, sample_members, write_tar

from dstrain.data import Dataset, Plan, Source, open_dataset
from dstrain.data import dataset as dataset_module
from dstrain.data.media.resolution import Resolution
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.selection import Clip, Wanted
from dstrain.data.shards.index import ShardIndex
from dstrain.errors import ConfigError, DataError


def sources(folder: Path, **counts: int) -> dict[str, str]:
    """One shard of so many samples for each name."""
    folder.mkdir(exist_ok=True)
    first = 0
    for name, count in counts.items():
        write_tar(folder / f"{name}.tar", sample_members(count, first=first))
        first += count
    return {name: str(folder / f"{name}.tar") for name in counts}


def test_tokens_are_those_of_the_target_size(tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path / "s", max_pixels=2048)
    tokens = dataset.tokens(np.arange(20))
    for row in range(20):
        raw = dataset.read(row)
        image = raw.files["image"]
        assert image.width % 16 == image.height % 16 == 0 and image.width * image.height <= 2048
        text = len(raw.captions[0].encode()) // 3 + 8
        assert tokens[row] == image.width // 16 * (image.height // 16) + text
        assert raw.files["image"].data == picture(*SIZES[row % len(SIZES)], seed=row)
        assert dataset.key(row) == raw.key == f"{row:04d}"
    assert tokens.max() <= dataset.max_tokens
    rows = np.array([19, 3, 3, 11, 0])
    assert dataset.tokens(rows).tolist() == [tokens[row] for row in rows]


def test_what_is_left_out_is_counted_with_its_reason(tmp_path: Path) -> None:
    members = [
        *sample_members(3),
        ("small.png", picture(15, 200)),
        ("small.txt", b"narrow"),
        ("bare.png", picture(32, 32)),
        ("blank.png", picture(32, 32)),
        ("blank.txt", b"  "),
        ("only.txt", b"a text without a picture"),
        ("meta.png", picture(32, 32)),
        ("meta.json", json.dumps({"url": "x"}).encode()),
        ("named.gif", b"GIF89a"),
        ("named.txt", b"a gif"),
    ]
    write_tar(tmp_path / "a.tar", members)
    dataset = open_dataset([str(tmp_path / "a.tar")])
    assert len(dataset) == 3
    found = {entry.key: entry.reason for entry in dataset.left_out.first}
    assert found == {
        "small": Reason.IMAGE_TOO_SMALL,
        "bare": Reason.NO_CAPTION,
        "blank": Reason.EMPTY_CAPTION,
        "only": Reason.NO_IMAGE,
        "meta": Reason.NO_CAPTION,
        "named": Reason.IMAGE_FORMAT,
    }
    assert dataset.left_out.counts == Counter(found.values())
    assert "3 samples in 1 shard" in dataset.summary() and "left out 6: no_caption 2" in dataset.summary()
    assert [dataset.key(row) for row in range(3)] == ["0000", "0001", "0002"]
    large = Wanted(Resolution(min_pixels=40 * 40))
    with pytest.raises(DataError, match=r"no sample can be used in 1 shard, .*a.tar \(left out: image_too_small 6"):
        open_dataset([str(tmp_path / "a.tar")], large)
    enlarged = open_dataset([str(tmp_path / "a.tar")], Wanted(Resolution(min_pixels=40 * 40, upscale=True)))
    assert {(f.width, f.height) for f in (enlarged.read(row).files["image"] for row in range(3))} == {(32, 32)}


def test_only_headers_are_read_where_the_totals_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", sample_members(4, (64, 64), first=4 * shard))
    open_dataset([str(folder)])  # makes the indexes
    looked = []
    rows = ShardIndex.rows
    monkeypatch.setattr(ShardIndex, "rows", property(lambda self: looked.append(self.path.name) or rows.fget(self)))
    dataset = open_dataset([str(folder)], Wanted(Resolution(64 * 64)))
    assert len(dataset) == 12 and not looked
    dataset.tokens(np.array([5]))
    assert set(looked) == {"1.tar"}


def test_shards_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = mixed_dataset(tmp_path / "s", shards=4, samples=5)
    monkeypatch.setattr(dataset_module, "_KEPT_ROWS", 11)
    tokens = dataset.tokens(np.arange(20))
    assert len(dataset._selected) == 2
    assert [int(dataset.tokens(np.array([row]))[0]) for row in range(20)] == tokens.tolist()


def test_repeats_and_weights(tmp_path: Path) -> None:
    paths = sources(tmp_path / "s", a=4, b=6)
    repeated = open_dataset({"a": Source([paths["a"]], repeat=3), "b": Source([paths["b"]])})
    assert [part.share for part in repeated.parts] == [12, 6] and len(repeated) == 10
    plan = Plan(repeated, seed=0, global_batch_size=9, tokens_per_pack=100, world_size=1)
    counts = Counter(row for step in range(2) for _, row in plan.batch(step))
    assert counts == {**dict.fromkeys(range(4), 3), **dict.fromkeys(range(4, 10), 1)}
    weighted = open_dataset({"a": Source([paths["a"]], weight=9), "b": Source([paths["b"]], weight=1)})
    plan = Plan(weighted, seed=0, global_batch_size=10, tokens_per_pack=100, world_size=1)
    first = sum(row < 4 for step in range(500) for _, row in plan.batch(step))
    assert 4300 < first < 4700


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": {"weight": 0.5}, "b": {}}, "source 'a' has a weight and 'b' has none"),
        ({"a": {"weight": 0.5, "repeat": 2}, "b": {"weight": 1}}, "source 'a' has both repeat and weight"),
        ({"a": {"repeat": 0}, "b": {}}, "source 'a': repeat and weight must be above 0"),
        ({"a": {"weight": -1}, "b": {"weight": 1}}, "source 'a': repeat and weight must be above 0"),
    ],
)
def test_shares_that_do_not_go_together(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    paths = sources(tmp_path / "s", a=2, b=2)
    with pytest.raises(ConfigError, match=message):
        open_dataset({name: Source([paths[name]], **options) for name, options in given.items()})


def test_a_source_without_samples_is_named(tmp_path: Path) -> None:
    paths = sources(tmp_path / "s", a=2)
    write_tar(tmp_path / "s" / "empty.tar", [("x.txt", b"text")])
    with pytest.raises(DataError, match="no sample of source 'b' can be used"):
        open_dataset({"a": Source([paths["a"]]), "b": Source([str(tmp_path / "s" / "empty.tar")])})


def test_the_digest_tells_other_samples(tmp_path: Path) -> None:
    paths = sources(tmp_path / "s", a=4, b=4)
    write_tar(tmp_path / "s" / "c.tar", [*sample_members(4)[:-1], ("0003.txt", b"caption x")])
    one = [open_dataset([paths[name]]).digest for name in "ab"] + [open_dataset([str(tmp_path / "s" / "c.tar")]).digest]
    both = open_dataset([paths["a"], paths["b"]]).digest, open_dataset([paths["b"], paths["a"]]).digest
    repeated = open_dataset({"a": Source([paths["a"]], repeat=2)}).digest
    assert len({*one, *both, repeated}) == 6
    assert open_dataset([paths["a"]]).digest == one[0]


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path / "s", shards=1)
    path = Path(dataset.shard(0))
    path.write_bytes(path.read_bytes().replace(b"caption", b"Caption"))
    with pytest.raises(BadSample, match="not those that were indexed") as caught:
        dataset.read(len(dataset) - 1)
    assert caught.value.reason is Reason.CHANGED


def test_replacements_cost_no_more_and_lead_out_of_the_shard(tmp_path: Path) -> None:
    dataset: Dataset = mixed_dataset(tmp_path / "s", shards=3, samples=10)
    tokens = dataset.tokens(np.arange(30))
    for row in range(30):
        rows = list(dataset.replacements(row, 8))
        assert len(rows) == len(set(rows)) <= 8 and row not in rows
        assert all(tokens[other] <= tokens[row] for other in rows)
        own = [other for other in rows if other // 10 == row // 10]
        assert rows[: len(own)] == own and len(own) <= 4
        assert own == [o for o in [*range(row + 1, row // 10 * 10 + 10), *range(row // 10 * 10, row)] if o in own]
    assert list(dataset.replacements(4, 0)) == []


def test_clips_are_four_k_and_one() -> None:
    for frames in (0, 2, 4, 80):
        with pytest.raises(ConfigError, match="4 k \\+ 1"):
            Clip(frames)
    assert Clip(81, 16.0).frames == 81


def test_remote_shards_need_a_cache() -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        open_dataset(["https://host/a-{0..1}.tar"])


def test_a_video_is_no_picture(tmp_path: Path) -> None:
    """Whatever its name says: the transformer would get frames where it wants a picture."""
    from test_data_pack import video_bytes

    video = video_bytes(frames=1)
    members = [("a.image.mp4", video), ("a.txt", b"a"), ("b.png", picture(32, 32)), ("b.edit_image.mp4", video)]
    members += [("b.txt", b"b"), ("c.png", picture(32, 32)), ("c.edit_image.png", picture(32, 32)), ("c.txt", b"c")]
    shard = str(write_tar(tmp_path / "a.tar", members))
    pictures = open_dataset([shard])
    assert [pictures.key(row) for row in range(len(pictures))] == ["b", "c"]
    edits = open_dataset([shard], Wanted(columns=("image", "edit_image")))
    assert [edits.key(row) for row in range(len(edits))] == ["c"]
    assert {e.key: e.detail for e in edits.left_out.first} == {
        "a": "there is no image",
        "b": "edit_image is no picture",
    }


def test_resampled_clips_stay_under_the_bound(tmp_path: Path) -> None:
    from test_data_pack import video_bytes

    shard = str(write_tar(tmp_path / "a.tar", [("a.mp4", video_bytes(frames=5)), ("a.txt", b"a")]))
    for frames, fps in ((33, 100.0), (5, 0.0), (81, 5.0)):
        dataset = open_dataset([shard], Wanted(columns=("video",), clip=Clip(frames, fps)))
        assert dataset.tokens(np.array([0]))[0] <= dataset.max_tokens
