"""Encoded samples: their file, damaged and hostile ones, and the shards that `dstrain encode` makes of a recipe."""

import json
import os
import shutil
import struct
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_samples import picture, sample_members, write_tar
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from small_runs import ROOT, prepare_run

from dstrain.cli import main
from dstrain.config import load_recipe
from dstrain.data.dataset import open_dataset
from dstrain.data.media.encoded import decode_encoded, probe_encoded, write_encoded
from dstrain.data.media.operators import Operators
from dstrain.data.media.resolution import Resolution
from dstrain.data.packing.pack import LOCK, pack
from dstrain.data.packing.writer import ShardWriter
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.sample import Expected, SampleReader
from dstrain.data.selection import Wanted
from dstrain.data.shards.catalog import open_index
from dstrain.data.shards.names import ENCODED, Content
from dstrain.data.shards.verify import verify
from dstrain.encoding import encode
from dstrain.engine.ds_config import read_ds_config
from dstrain.errors import ConfigError, DataError
from dstrain.job import load_pipeline, open_data, prepare, wanted_samples
from dstrain.pipelines import PIPELINES
from dstrain.storage import locked

DS = ROOT / "ds_configs/zero2.json"
SIZE = {"width": 32, "height": 16, "frames": 1, "stamp": "somebody"}


def tensors():
    g = torch.Generator().manual_seed(0)
    return {"b": torch.randn(2, 3, generator=g), "a": torch.randn(5, generator=g).bfloat16()}


def encoded(**changes):
    return write_encoded(tensors(), **{**SIZE, **changes})


def with_header(change):
    """A file whose header was changed by `change`, which gets it as a dict."""
    data = encoded()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_a_file_is_read_as_it_was_written_and_by_the_format_s_own_library():
    data = encoded()
    header, read = decode_encoded(data)
    assert (header.width, header.height, header.frames, header.stamp) == (32, 16, 1, "somebody")
    for loaded in (read, load_tensors(data)):
        assert loaded.keys() == {"a", "b"}
        assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors().items())
    assert data == write_encoded(dict(reversed(tensors().items())), **SIZE)
    read["b"].zero_()  # a copy of its own
    assert data == encoded()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a safetensors file"),
        (b"PK\3\4" * 9, "not a safetensors file"),
        (encoded()[:-1], "its tensors end at byte"),
        (encoded() + b"\0", "its tensors end at byte"),
        (encoded()[:40], "not a safetensors file, or cut off"),
        (struct.pack("<Q", 1 << 62) + encoded()[8:], "not a safetensors file"),
        (save_tensors(tensors()), "its header cannot be"),  # nobody says what it is
        (with_header(lambda h: b"[" * 60000), "its header cannot be"),
        (with_header(lambda h: b"[1]"), "its header cannot be"),
        (with_header(lambda h: h.update(__metadata__=["width"])), "its header cannot be"),
        (encoded(width=0), "its header cannot be"),
        (encoded(width=-16), "its header cannot be"),
        (encoded(width=17), "17 x 16 pixels"),
        (encoded(width=1 << 16), "65536 x 16 pixels"),
        (encoded(width="٣٢"), "its header cannot be"),
        (encoded(height="9" * 5000), "its header cannot be"),
        (encoded(frames=1 << 20), "frames"),
        (encoded(stamp="a\nb"), "what encoded it is not told"),
        (encoded(stamp="a" * 2000), "what encoded it is not told"),
        (with_header(lambda h: h["__metadata__"].update(stamp=3)), "what encoded it is not told"),
        (with_header(lambda h: h["b"].update(dtype="F64")), "its header cannot be"),
        (with_header(lambda h: h["b"].update(dtype=["F32"])), "its header cannot be"),
        (with_header(lambda h: h["b"].update(shape=[2, 4])), "its header cannot be"),
        (with_header(lambda h: h["b"].update(shape=[-2, -3])), "its header cannot be"),
        (with_header(lambda h: h["b"].update(shape=[0, 1 << 70], data_offsets=[0, 0])), "its header cannot be"),
        (with_header(lambda h: h["b"].update(shape=[True, 6])), "its header cannot be"),
        (with_header(lambda h: h["b"].update(shape=6)), "its header cannot be"),
        (with_header(lambda h: h["b"].update(data_offsets=[0, 24, 24])), "its header cannot be"),
        (with_header(lambda h: h["b"].update(data_offsets=[-24, 0])), "its header cannot be"),
        (with_header(lambda h: h["a"].update(data_offsets=[0, 10])), "do not lie end to end"),
        (with_header(lambda h: h["a"].update(data_offsets=[26, 36])), "do not lie end to end"),
        (with_header(lambda h: h.pop("a") and None), "its tensors end at byte"),
        (with_header(lambda h: h.update({"../x": h.pop("a")})), "its header cannot be"),
    ],
)
def test_damage_and_hostile_headers_are_seen_before_memory_is_taken(data, says):
    with pytest.raises(BadSample, match=says) as caught:
        probe_encoded(data)
    assert caught.value.reason is Reason.ENCODED_DAMAGED


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_damage(value):
    bad = {**tensors(), "c": torch.tensor([0.0, value])}
    with pytest.raises(BadSample, match="c holds values that are not finite"):
        decode_encoded(write_encoded(bad, **SIZE))


def test_too_large_is_another_reason(monkeypatch):
    with pytest.raises(BadSample, match="more than") as caught:
        probe_encoded(encoded(width=1 << 14, height=1 << 14))
    assert caught.value.reason is Reason.ENCODED_SIZE
    monkeypatch.setattr("dstrain.data.media.encoded.MAX_ENCODED_BYTES", 100)
    with pytest.raises(BadSample, match="more than 100"):
        probe_encoded(encoded())


def shard(path, count=4, **changes):
    members = [
        pair
        for i in range(count)
        for pair in ((f"{i:03d}.{ENCODED}", encoded(**changes)), (f"{i:03d}.txt", f"text {i}".encode()))
    ]
    return write_tar(path, members)


def test_an_index_knows_sizes_and_leaves_out_damage(tmp_path):
    members = [
        (f"a.{ENCODED}", encoded(width=64, height=48)),
        ("a.txt", b"one"),
        (f"b.{ENCODED}", b"nothing"),
        ("b.txt", b"two"),
        ("c.safetensors", b"not ours, and not looked into"),
        ("c.txt", b"three"),
    ]
    index = open_index(write_tar(tmp_path / "a.tar", members))
    (part,) = index.parts[index.part_of(ENCODED)[index.part_of(ENCODED) >= 0]]
    assert (part["width"], part["height"], part["frames"], part["kind"]) == (64, 48, 1, Content.ENCODED)
    assert [(entry.key, entry.reason) for entry in index.excluded] == [("b", Reason.ENCODED_DAMAGED)]
    assert list(index.keys) == ["a", "c"]
    dataset = open_dataset([str(tmp_path / "a.tar")], encoded=True)
    assert (len(dataset), dataset.wanted.columns) == (1, (ENCODED,))
    assert dataset.tokens(np.array([0])).tolist() == [4 * 3 + 1 + 8]
    assert {damage.reason for damage in verify(tmp_path / "a.tar")} == {Reason.ENCODED_DAMAGED}


def test_verify_decodes_and_pack_keeps_encoded_members(tmp_path):
    path = shard(tmp_path / "a.tar")
    report = pack(str(path), tmp_path / "again")
    with tarfile.open(report.shards[0]) as tar:
        names = tar.getnames()
    assert [name.partition(".")[2] for name in names] == [ENCODED, "txt"] * 4
    assert not verify(report.shards[0])
    bad = {**tensors(), "b": torch.full((2, 3), torch.nan)}
    broken = write_tar(tmp_path / "b.tar", [(f"a.{ENCODED}", write_encoded(bad, **SIZE)), ("a.txt", b"text")])
    open_index(broken)  # which reads headers only
    assert [damage.reason for damage in verify(broken)] == [Reason.ENCODED_DAMAGED]
    assert [entry.reason for entry in pack(f"{tmp_path}/[ab].tar", tmp_path / "both").refused] == [
        Reason.ENCODED_DAMAGED
    ]


@pytest.mark.parametrize(
    ("resolution", "left"),
    [
        (Resolution(), 4),
        (Resolution(max_pixels=32 * 16), 4),
        (Resolution(max_pixels=32 * 16 - 1), 0),
        (Resolution(width=32, height=16), 4),
        (Resolution(width=16, height=32), 0),
        (Resolution(min_pixels=1 << 12, upscale=True), 4),  # the sizes are those of the encoding
    ],
)
def test_sizes_of_encoded_samples_stay_or_are_left_out(tmp_path, resolution, left):
    path = str(shard(tmp_path / "a.tar"))
    if left:
        dataset = open_dataset([path], Wanted(resolution), encoded=True)
        assert len(dataset) == left
        assert dataset.max_tokens >= dataset.tokens(np.arange(left)).max() == 2 + 2 + 8
    else:
        says = r"encoded_size 4\).*data.max_pixels, width and height must be those that they were encoded with"
        with pytest.raises(DataError, match=says):
            open_dataset([path], Wanted(resolution), encoded=True)


def test_pictures_and_encoded_samples_together_are_refused(tmp_path):
    one, two = str(shard(tmp_path / "a.tar")), str(write_tar(tmp_path / "b.tar", sample_members(3)))
    with pytest.raises(DataError, match=r"a\.tar holds encoded samples and .*b\.tar holds none; train on one kind"):
        open_dataset([one, two], encoded=True)
    assert open_dataset([two], encoded=True).wanted.columns == ("image",)
    with pytest.raises(DataError, match="no_image 4"):
        open_dataset([one])  # who did not ask for them is not given them


def reader(dataset, stamp="somebody", fault=""):
    expected = Expected(stamp, lambda columns: fault)
    return SampleReader(dataset, operators=Operators(), seed=0, background=(0, 0, 0), expected=expected)


def test_a_reader_gives_tensors_and_sizes_and_refuses_others(tmp_path):
    dataset = open_dataset([str(shard(tmp_path / "a.tar"))], encoded=True)
    sample = reader(dataset)(2, draw=7)
    assert (sample.caption, sample.draw, sample.columns["width"], sample.columns["height"]) == ("text 2", 7, 32, 16)
    assert torch.equal(sample.columns["b"], tensors()["b"])
    with pytest.raises(BadSample, match="it has no latents"):
        reader(dataset, fault="it has no latents")(0, draw=0)
    says = r"a\.tar was encoded by somebody, and this training's model is me in fp32; encode .*model\.encoder_dtype"
    with pytest.raises(DataError, match=says) as caught:
        reader(dataset, stamp="me in fp32")(0, draw=0)
    assert not isinstance(caught.value, BadSample)  # it would be replaced


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe of 24 pictures in three shards, of 10, 10 and 4."""
    tmp = tmp_path_factory.mktemp("run")
    recipe = prepare_run(tmp)
    return tmp, recipe


def encode_run(recipe, out, *overrides, shard_samples=0):
    loaded = load_recipe(recipe, overrides)
    return encode(loaded, out, device=torch.device("cpu"), dtype=torch.float32, shard_samples=shard_samples)


@pytest.fixture(scope="module")
def made(run):
    tmp, recipe = run
    encode_run(recipe, tmp / "encoded")
    return tmp / "encoded"


def datasets(recipe, shards):
    """Two datasets: the pictures, and what was encoded from them."""
    loaded = load_recipe(recipe), load_recipe(recipe, [f"data.shards=[{shards}]"])
    return [open_data(r.data, wanted_samples(r.data, ("image",))) for r in loaded]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_the_plan_is_that_of_the_pictures(run, made):
    pictures, encoded_ = datasets(run[1], made)
    rows = np.arange(len(pictures))
    assert [part.counts.tolist() for part in pictures.parts] == [part.counts.tolist() for part in encoded_.parts]
    assert pictures.tokens(rows).tolist() == encoded_.tokens(rows).tolist()
    assert [pictures.key(row) for row in rows] == [encoded_.key(row) for row in rows]
    assert [pictures.read(row).captions for row in rows] == [encoded_.read(row).captions for row in rows]


def test_what_is_stored_is_what_the_units_make(run, made):
    _, recipe = run
    loaded = load_recipe(recipe)
    pictures, encoded_ = datasets(recipe, made)
    family = PIPELINES.get("qwen_image")
    pipeline = load_pipeline(
        family,
        loaded,
        device=torch.device("cpu"),
        dtype=torch.float32,
        load=("vae", "text_encoder", "tokenizer"),
    )
    stamp = pipeline.stamp(torch.float32)
    read = SampleReader(pictures, operators=Operators(), seed=5, background=(255, 255, 255))
    stored = reader(encoded_, stamp)
    for row in (0, 4, 11, 23):
        sample = read(row, draw=row)
        want = pipeline.encode(pipeline.batch([sample.columns], [sample.caption], [row]))
        got = stored(row, draw=row).columns
        assert pipeline.encoded_fault(got) == ""
        assert got.keys() == {"latents", "prompt_embeds", "null_embeds", "width", "height"}
        assert all(torch.equal(torch.as_tensor(got[name]), torch.as_tensor(want[name][0])) for name in got)


def test_a_job_on_encoded_shards_loads_no_encoder(run, made):
    _, recipe = run
    ds = read_ds_config(DS)
    overrides = [f"data.shards=[{made}]", "model.encoder_dtype=fp32"]
    job = prepare(load_recipe(recipe, overrides), DS, ds, 2)
    assert job.frozen == ("scheduler",)
    assert job.encoder_memory() == (0, 0)
    painted = prepare(load_recipe(recipe, [*overrides, "sample.every=1", "sample.prompts=[a]"]), DS, ds, 2)
    assert set(painted.frozen) == {"vae", "text_encoder", "tokenizer", "scheduler"}
    pictures = prepare(load_recipe(recipe, ["model.encoder_dtype=fp32"]), DS, ds, 2)
    sizes = pictures.pipeline.encoder_bytes(torch.float32)
    assert pictures.encoder_memory() == (sum(sizes.values()), 0) == painted.encoder_memory()
    away = prepare(load_recipe(recipe, ["model.encoder_dtype=fp32", "model.encoders=offload"]), DS, ds, 2)
    assert away.encoder_memory() == (max(sizes.values()), sum(sizes.values()))


def test_encoded_by_another_model_or_in_another_dtype_is_refused(run, made, tmp_path):
    tmp, recipe = run
    ds = read_ds_config(DS)
    says = r"shard-000000\.tar was encoded by QwenImagePipeline \(vae .*\) in float32, and .* in bfloat16; encode"
    with pytest.raises(DataError, match=says):
        prepare(load_recipe(recipe, [f"data.shards=[{made}]", "model.encoder_dtype=bf16"]), DS, ds, 2)
    other = Path(shutil.copytree(tmp / "model", tmp_path / "model"))
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps({**config, "latents_std": [3.0] * 16}))
    overrides = [f"data.shards=[{made}]", "model.encoder_dtype=fp32", f"model.path={other}"]
    with pytest.raises(DataError, match=r"was encoded by QwenImagePipeline \(vae (\w+),.* model is .*\(vae (?!\1)"):
        prepare(load_recipe(recipe, overrides), DS, ds, 2)


RANDOM = [
    ("data.crop=random", r"data\.crop: random would"),
    ("data.flip=0.5", r"data\.flip: 0\.5 would"),
    ("data.caption=random", r"data\.caption: random would"),
    ("data.shuffle_tags=true", r"data\.shuffle_tags: true would"),
]


@pytest.mark.parametrize(("override", "says"), RANDOM)
def test_what_is_drawn_at_random_cannot_be_encoded_nor_asked_of_what_is(run, made, tmp_path, override, says):
    _, recipe = run
    with pytest.raises(ConfigError, match=f"{says} choose anew for every draw"):
        encode_run(recipe, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()
    overrides = [f"data.shards=[{made}]", "model.encoder_dtype=fp32", override]
    with pytest.raises(ConfigError, match=says):
        prepare(load_recipe(recipe, overrides), DS, read_ds_config(DS), 2)


def test_several_random_operators_are_named_together(run, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.crop: random and data\.flip: 0\.2 would"):
        encode_run(run[1], tmp_path / "out", "data.crop=random", "data.flip=0.2")


def test_encoding_again_does_nothing_and_another_encoding_is_refused(run, made, tmp_path):
    _, recipe = run
    before = content(made)
    stamps = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    encode_run(recipe, made)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == stamps
    with pytest.raises(DataError, match=r"this is not the same packing \(resolution was .*'max_pixels': 1048576"):
        encode_run(recipe, made, "data.max_pixels=1024")
    with pytest.raises(DataError, match=r"background was \[255, 255, 255\], now \[0, 0, 0\]"):
        encode_run(recipe, made, "data.background=black")
    assert content(made) == before
    with pytest.raises(DataError, match="holds encoded samples already; name the shards of pictures"):
        encode_run(recipe, tmp_path / "out", f"data.shards=[{made}]")
    with pytest.raises(DataError, match="and this is not the same packing"):
        encode_run(recipe, run[0] / "shards")
    with locked(made / LOCK, wait=False), pytest.raises(DataError, match="another process is encoding into"):
        encode_run(recipe, made)


def die_after(left, name, recipe, out):
    """Encode, and end without any clean-up in the middle: after so many calls of a method of the writer."""
    act = getattr(ShardWriter, name)

    def counted(self, *args):
        nonlocal left
        act(self, *args)
        left -= 1
        if not left:
            os._exit(9)

    setattr(ShardWriter, name, counted)
    encode_run(recipe, out)


def test_killed_anywhere_and_started_again_gives_the_same_bytes(run, made, tmp_path):
    _, recipe = run
    out = tmp_path / "out"
    # In the first shard; in the second; when that is there and the ledger does not know it yet; in the last.
    for left, name, there in ((4, "add", 0), (13, "add", 1), (1, "publish", 2), (11, "add", 2)):
        process = get_context("fork").Process(target=die_after, args=(left, name, recipe, out))
        process.start()
        process.join(60)
        assert process.exitcode == 9
        assert len(content(out)) == there
    encode_run(recipe, out)
    assert content(out) == content(made)
    assert not list(out.glob(".shard*"))


def test_smaller_shards_hold_the_same_samples(run, made, tmp_path):
    _, recipe = run
    (report,) = encode_run(recipe, tmp_path / "out", shard_samples=4)
    counts = [open_index(path).samples for path in report.shards]
    assert counts == [4, 4, 2, 4, 4, 2, 4]  # a shard never spans two of the data's
    members = []
    for folder in (made, tmp_path / "out"):
        found = []
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                found += [(member.name, tar.extractfile(member).read()) for member in tar]
        members.append(found)
    assert members[0] == members[1]


def test_damaged_pictures_are_refused_and_long_names_and_several_captions_kept(run, tmp_path):
    _, recipe = run
    long = "n" * 90
    cut = picture(64, 48)
    members = [
        (f"{long}.png", picture(32, 32)),
        (f"{long}.json", json.dumps({"caption": ["a cat", "a much longer caption of a cat"]}).encode()),
        ("bad.jpg", b"\xff\xd8\xff" + b"\0" * 40),
        ("bad.txt", b"text"),
        ("worse.png", cut),
        ("worse.txt", b"text"),
    ]
    path = write_tar(tmp_path / "in.tar", members)
    open_index(path)
    data = path.read_bytes()
    at = data.index(cut) + len(cut) // 2
    stat = path.stat()
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])  # after it was indexed
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (report,) = encode_run(recipe, tmp_path / "out", f"data.shards=[{path}]")
    assert (report.samples, [entry.reason for entry in report.refused]) == (1, [Reason.CHANGED])
    (dataset,) = [d for d in datasets(recipe, tmp_path / "out") if ENCODED in d.wanted.columns]
    raw = dataset.read(0)
    assert raw.key == "00000000-" + "n" * 60
    assert raw.captions == ["a cat", "a much longer caption of a cat"]
    assert dataset.tokens(np.array([0])).tolist() == [4 + 10 + 8]


def test_sources_have_folders_of_their_own(run, tmp_path):
    tmp, recipe = run
    tree = yaml.safe_load(recipe.read_text())
    del tree["data"]["shards"]
    shards = [str(tmp / f"shards/shard-00000{i}.tar") for i in range(3)]
    tree["data"]["sources"] = {"cats": {"shards": shards[2:], "weight": 3}, "all": {"shards": shards[:2], "weight": 1}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    reports = encode_run(path, tmp_path / "out")
    assert [report.samples for report in reports] == [4, 20]
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/*/*.tar")) == [
        "all/shard-000000.tar",
        "all/shard-000001.tar",
        "cats/shard-000000.tar",
    ]
    tree["data"]["sources"] = {"../cats": {"shards": shards}}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(ConfigError, match=r"data\.sources: '\.\./cats' cannot be the name of a folder"):
        encode_run(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "gpu9"], "--device gpu9"),
        (["data.flip=0.1"], "data.flip: 0.1 would"),
        (["data.shards=[nowhere]"], "no such shard: 'nowhere'"),
        (["model.path=nowhere"], "nowhere"),
        (["data.flop=1"], "did you mean 'flip'"),
    ],
)
def test_the_command_refuses_in_one_sentence(run, tmp_path, capsys, arguments, says):
    assert main(["encode", "--config", str(run[1]), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dstrain: error: ")
    assert says in error


def test_the_index_command_describes_encoded_shards(made, capsys):
    assert main(["index", str(made)]) == 0
    assert "24 samples in 3 shards" in capsys.readouterr().out
