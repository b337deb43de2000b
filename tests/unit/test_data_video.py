"""Videos of every kind become the right frames, always as many as were counted, or are refused."""

import io
import random
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.media import containers, video
from dstrain.data.media.decode import Place
from dstrain.data.media.timing import available_frames
from dstrain.data.media.video import clip_frames, decode_video, probe_video
from dstrain.data.reasons import BadSample, Reason
from dstrain.errors import DataError

av = pytest.importorskip("av")
SIZE = (96, 64)
B_FRAMES = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=4:b-pyramid=2:log-level=-1"}
OPEN_GOP = {"x264-params": B_FRAMES["x264-params"] + ":open-gop=1"}


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A smooth picture, the right half of it brighter, that moves from frame to frame."""
    y, x = np.mgrid[: size[1], : size[0]]
    grey = 60 + 50 * np.sin((x + 3 * number) / 9) + 30 * np.cos((y - 2 * number) / 7) + 60 * (x >= size[0] // 2)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def encode(
    frames: int = 40,
    container: str = "mp4",
    codec: str = "libx264",
    *,
    rate: Fraction | int = 24,
    size: tuple[int, int] = SIZE,
    times: list[int] | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: tuple[float, bool] | None = None,
    sound: bool = False,
) -> bytes:
    """Make a video. times: of presentation of each frame, in ms. rotation: degrees to the left, mirrored after it."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options=B_FRAMES if codec == "libx264" and not options else options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        if sound:
            audio = out.add_stream("pcm_s16le" if container in ("mov", "matroska") else "aac", rate=8000, layout="mono")
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            tone.sample_rate, tone.pts = 8000, 0
            out.mux(audio.encode(tone) + audio.encode())
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def remux(data: bytes, container: str, shift: int = 0, first: int = 0, **options: str) -> bytes:
    """Copy the packets of a video from number `first` on, their times shifted, to a container with muxer options."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container, options=options) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size and number >= first:
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                out.mux(packet)
    return file.getvalue()


def moov_first(data: bytes) -> bytes:
    """Put the tables of an MP4 before its frames, as for streaming."""
    mdat, moov = data.find(b"mdat") - 4, data.find(b"moov") - 4
    tables = bytearray(data[moov:])
    place = tables.find(b"stco") + 8
    (count,) = struct.unpack_from(">I", tables, place)
    for offset in range(place + 4, place + 4 + 4 * count, 4):
        struct.pack_into(">I", tables, offset, struct.unpack_from(">I", tables, offset)[0] + len(tables))
    return data[:mdat] + bytes(tables) + data[mdat:moov]


def all_frames(data: bytes) -> torch.Tensor:
    """Every frame from the beginning on, as FFmpeg gives it: uint8 [F, 3, H, W]."""
    with av.open(io.BytesIO(data)) as source:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in source.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


def refused(data: bytes) -> Reason:
    with pytest.raises(BadSample) as error:
        decode_video(data, SIZE, frames=1 + (probe_video(data).frames - 1) // 4 * 4)
    return error.value.reason


MADE = {
    "h264 mp4": encode(),
    "h264 mp4 30 fps": encode(rate=30),
    "h264 mp4 23.976 fps": encode(rate=Fraction(24000, 1001)),
    "h264 mkv": encode(container="matroska"),
    "h264 open gop mp4": encode(options=OPEN_GOP),
    "h264 open gop mkv": encode(container="matroska", options=OPEN_GOP),
    "h264 intra refresh": encode(container="matroska", options={"x264-params": "intra-refresh=1:keyint=10"}),
    "mov with sound": encode(container="mov", sound=True),
    "mkv with sound": encode(container="matroska", sound=True),
    "mpeg4": encode(codec="mpeg4", options={"g": "9", "bf": "2"}),
    "mjpeg": encode(container="mov", codec="mjpeg", pixels="yuvj420p"),
    "prores": encode(container="mov", codec="prores_ks", pixels="yuv422p10le"),
    "vp8": encode(container="webm", codec="libvpx", options={"g": "15"}),
    "vp9": encode(container="webm", codec="libvpx-vp9", options={"g": "15", "cpu-used": "8", "row-mt": "0"}),
}
MADE |= {
    "fragments": remux(MADE["h264 mp4"], "mp4", movflags="frag_keyframe+empty_moov+default_base_moof"),
    "moov first": moov_first(MADE["h264 mp4"]),
    "live mkv": remux(MADE["h264 mp4"], "matroska", live="1"),
    "cut by an edit list": remux(MADE["h264 mp4"], "mp4", -512 * 6, avoid_negative_ts="disabled", use_editlist="1"),
}


@pytest.mark.parametrize("name", MADE)
def test_any_start_gives_the_frames_that_decoding_all_gives(name: str) -> None:
    data = MADE[name]
    expected, header = all_frames(data), probe_video(data)
    assert header.frames == len(expected) == (34 if "edit" in name else 40)
    assert (header.width, header.height) == SIZE
    assert header.fps == pytest.approx(30 if "30" in name else 23.976 if "23" in name else 24, abs=0.1)
    for start in (0.0, 0.2, 0.45, 0.7, 0.999):
        first = int(start * (len(expected) - 8))
        assert torch.equal(decode_video(data, SIZE, frames=9, start=start), expected[first : first + 9]), start
    whole = decode_video(data, SIZE, frames=81)
    assert torch.equal(whole, expected[: 33 if "edit" in name else 37]) and whole.is_contiguous()


@pytest.mark.parametrize("name", ["h264 mp4", "h264 open gop mkv", "vp9", "fragments"])
def test_a_late_start_decodes_no_more_than_it_must(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    real = video._Clip.decode
    monkeypatch.setattr(
        video._Clip, "decode", lambda clip, packet, sure: decoded.append(packet.pts) or real(clip, packet, sure)
    )
    decode_video(MADE[name], SIZE, frames=1, start=0.999)
    assert 1 <= len(decoded) <= 24  # of 40: one group of pictures, or a second attempt with the one before it


def test_early_frames_end_the_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    real = video._Clip.decode
    monkeypatch.setattr(
        video._Clip, "decode", lambda clip, packet, sure: decoded.append(packet.pts) or real(clip, packet, sure)
    )
    decode_video(MADE["h264 mp4"], SIZE, frames=5)
    assert len(decoded) <= 20


# Numbers of frames, and rates


@given(
    st.integers(0, 5000),
    st.sampled_from([0.0, 8.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 59.94, 60.0, 120.0]) | st.floats(0.5, 240),
    st.integers(0, 60).map(lambda k: 4 * k + 1),
    st.sampled_from([0.0, 8.0, 16.0, 23.976, 24.0, 30.0]),
)
@settings(max_examples=300, deadline=None)
def test_laws_of_the_number_of_frames(frames: int, fps: float, wanted: int, fps_wanted: float) -> None:
    fps = round(fps, 3)
    count = int(clip_frames(frames, fps, wanted, fps_wanted))
    available = int(available_frames(frames, fps, fps_wanted))
    assert count == int(clip_frames(frames, np.float32(fps), wanted, fps_wanted))  # as an index keeps it
    if not frames:
        assert count == 0
        return
    assert count % 4 == 1 and 1 <= count <= min(wanted, available)
    assert count == wanted or available - count < 4  # no more can be had
    assert int(clip_frames(count, fps, wanted, 0.0)) == count
    if fps_wanted in (0.0, fps) or fps == 0 or frames == 1:
        assert available == frames
    else:  # the last is nearer to a stored frame than half a period, the next would not be
        stored, rate = Fraction(round(fps * 1000), 1000), Fraction(round(fps_wanted * 1000), 1000)
        assert (available - 1) / rate <= (frames - Fraction(1, 2)) / stored < available / rate


def test_many_videos_are_counted_as_one_by_one() -> None:
    frames, fps = np.array([[0, 1, 81], [100, 7, 60]], np.int32), np.array([[0, 0, 24], [29.97, 30, 60]], np.float32)
    counts = clip_frames(frames, fps, 49, 16.0)
    assert counts.dtype == np.int64
    assert counts.tolist() == [
        [int(clip_frames(int(n), float(r), 49, 16.0)) for n, r in zip(*rows)] for rows in zip(frames, fps)
    ]
    assert counts.tolist() == [[0, 1, 49], [49, 1, 13]]


@pytest.mark.parametrize("name", ["h264 mp4", "h264 mp4 23.976 fps", "h264 mkv", "vp8"])
@pytest.mark.parametrize("fps", [8.0, 16.0, 24.0, 30.0, 60.0])
def test_resampling_takes_the_nearest_frame_in_time(name: str, fps: float) -> None:
    data = MADE[name]
    expected, header = all_frames(data), probe_video(data)
    clip = decode_video(data, SIZE, frames=201, fps=fps)
    assert len(clip) == int(clip_frames(header.frames, header.fps, 201, fps))
    rate = 24000 / 1001 if "23" in name else 24
    distance = [abs(number / fps - np.arange(40) / rate) for number in range(len(clip))]
    for pixels, away in zip(clip, distance):
        taken = int((expected.int() - pixels.int()).abs().flatten(1).max(dim=1).values.argmin())
        assert torch.equal(expected[taken], pixels)
        assert away[taken] <= away.min() + 0.0006  # Matroska's times are in milliseconds


def test_resampling_of_a_variable_rate() -> None:
    times = [0, 40, 80, 300, 320, 340, 700, 1000, 1001, 1300, 1700, 1710, 1720, 2000]
    for container in ("mp4", "matroska"):
        data = encode(len(times), container, times=times)
        header, expected = probe_video(data), all_frames(data)
        assert header.frames == len(times) and header.fps == 6.5
        assert torch.equal(decode_video(data, SIZE, frames=81), expected[:13])  # as stored: all of them
        clip = decode_video(data, SIZE, frames=81, fps=10.0)
        nearest = [int(np.abs(np.array(times) - 100 * number).argmin()) for number in range(len(clip))]
        assert len(clip) == 21 and torch.equal(clip, expected[nearest])
        later = decode_video(data, SIZE, frames=5, fps=10.0, start=0.5)
        assert torch.equal(later, expected[nearest[8:13]])


def test_a_single_frame_is_a_clip_at_any_rate() -> None:
    data = encode(1)
    assert probe_video(data).frames == 1 and probe_video(data).fps == 0
    for fps in (0.0, 24.0):
        assert torch.equal(decode_video(data, SIZE, frames=5, fps=fps, start=0.9), all_frames(data))


# Sizes, windows and orientation


def test_all_frames_have_one_window() -> None:
    data = MADE["h264 mp4"]
    full = all_frames(data)[:5]
    for place, x, y in ((Place(), 24, 16), (Place(0, 1), 0, 32), (Place(1, 0), 48, 0)):
        clip = decode_video(data, (48, 32), frames=5, fit="crop", place=place)
        assert torch.equal(clip, full[:, :, y : y + 32, x : x + 48])
        assert torch.equal(decode_video(data, (48, 32), frames=5, fit="crop", place=place, flip=True), clip.flip(-1))
    assert decode_video(data, (48, 48), frames=5).shape == (5, 3, 48, 48)
    assert decode_video(data, (160, 128), frames=1).shape == (1, 3, 128, 160)
    with pytest.raises(BadSample, match="no window"):
        decode_video(data, (112, 64), frames=5, fit="crop")


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotated_videos_are_upright(degrees: int, mirrored: bool) -> None:
    """Phones store what they saw on the side, with a matrix that says so."""
    data = encode(5, rotation=(degrees, mirrored))
    stored = all_frames(data)
    expected = torch.rot90(stored, degrees // 90 % 4, (2, 3))
    expected = expected.flip(-1) if mirrored else expected
    header = probe_video(data)
    assert (header.width, header.height) == (expected.shape[3], expected.shape[2])
    assert torch.equal(decode_video(data, (header.width, header.height), frames=5), expected)


def test_pixels_that_are_not_square_are_made_so() -> None:
    data = bytearray(encode(5, "mp4", "mpeg4", options={"aspect": "3"}))
    place = data.find(b"pasp")
    assert place > 0
    struct.pack_into(">II", data, place + 4, 2, 1)
    header = probe_video(bytes(data))
    assert (header.width, header.height) == (192, 64)
    assert decode_video(bytes(data), (192, 64), frames=5).shape == (5, 3, 64, 192)


# Refusals


@pytest.mark.parametrize("name", ["h264 mp4", "moov first", "fragments", "h264 mkv", "mov with sound", "vp8"])
def test_a_file_that_is_cut_off_is_refused(name: str) -> None:
    data = MADE[name]
    for size in [*range(12, 60), *range(60, len(data) - 1, max(1, len(data) // 60))]:
        with pytest.raises(BadSample) as error:
            probe_video(data[:size])
        assert error.value.reason in (Reason.VIDEO_DAMAGED, Reason.VIDEO_FORMAT)


@pytest.mark.parametrize("name", ["h264 mp4", "h264 mkv", "vp9", "mpeg4", "mjpeg"])
def test_damaged_bytes_are_refused_or_give_every_frame_that_was_counted(name: str) -> None:
    data, rng, bad = MADE[name], random.Random(name), 0
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            broken[rng.randrange(len(data))] = rng.randrange(256)
        try:
            header = probe_video(bytes(broken))
            wanted = 1 + 4 * ((min(header.frames, 45) - 1) // 4)
            assert decode_video(bytes(broken), SIZE, frames=wanted).shape == (wanted, 3, SIZE[1], SIZE[0])
        except BadSample:
            bad += 1
    assert bad >= {"h264 mkv": 58, "vp9": 10, "mjpeg": 20}.get(name, 30)  # Matroska has checksums, VP9 nothing


def test_a_lost_frame_is_never_passed_over() -> None:
    """A frame in the middle that cannot be decoded: clips without it are good, the others are refused."""
    data = bytearray(MADE["h264 mp4"])
    with av.open(io.BytesIO(bytes(data))) as source:
        packets = [(packet.pos, packet.size, packet.is_keyframe) for packet in source.demux(video=0) if packet.size]
    keys = [number for number, packet in enumerate(packets) if packet[2]]
    assert len(keys) >= 3
    position, size, _ = packets[keys[1]]
    data[position + 4 : position + size] = bytes(size - 4)
    broken = bytes(data)
    assert probe_video(broken).frames == 40
    good = all_frames(MADE["h264 mp4"])
    assert torch.equal(decode_video(broken, SIZE, frames=5), good[:5])
    assert torch.equal(decode_video(broken, SIZE, frames=5, start=0.999), good[35:])
    for start in (0.3, 0.45):
        with pytest.raises(BadSample) as error:
            decode_video(broken, SIZE, frames=5, start=start)
        assert error.value.reason is Reason.VIDEO_DAMAGED


def test_frames_that_are_not_shown_are_not_counted() -> None:
    """VP8 stores pictures that only serve as references, each a packet of its own."""
    data = bytearray(MADE["vp8"])
    with av.open(io.BytesIO(bytes(data))) as source:
        hidden = [bytes(packet) for packet in source.demux(video=0) if packet.size][20]
    data[data.find(hidden)] &= ~0x10
    assert probe_video(bytes(data)).frames == 39
    assert decode_video(bytes(data), SIZE, frames=37).shape[0] == 37


def test_a_stream_that_begins_in_the_middle_is_refused() -> None:
    with pytest.raises(BadSample, match="first frame"):
        probe_video(remux(MADE["h264 mp4"], "mp4", first=5))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a text named .mp4",
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"RIFF\0\0\0\0AVI LIST",
        b"\0\0\x01\xba" + bytes(100),
        encode(5, "avi", "mpeg4"),
        encode(5, "matroska", "ffv1"),
        encode(5, "mov", "rawvideo", pixels="rgb24"),
        encode(5, "matroska", "mpeg2video", options={}),
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(BadSample) as error:
        probe_video(data)
    assert error.value.reason is Reason.VIDEO_FORMAT


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def boxes(data: bytes) -> list[bytes]:
    """The types of the boxes that a demuxer comes across: also in those where nothing should be looked for."""
    found, place = [], 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        found.append(kind)
        if kind in b"moov trak mdia minf stbl udta wave dinf moof traf edts".split():
            found += boxes(data[place + 8 : place + size])
        elif kind == b"meta":
            found += boxes(data[place + (8 if data[place + 12 : place + 16].isalpha() else 12) : place + size])
        place += size
    return found


def patched(data: bytes, kind: bytes, offset: int, number: int) -> bytes:
    """Write a 32-bit number at an offset of the first box of a type."""
    place = data.find(kind) + 4 + offset
    return data[:place] + struct.pack(">I", number) + data[place + 4 :]


@pytest.mark.parametrize(
    "data",
    [
        patched(patched(MADE["h264 mp4"], b"stsz", 4, 1), b"stsz", 8, 0x7FFFFFFF),  # as many frames, of a byte each
        patched(MADE["fragments"], b"trun", 4, 0x7FFFFFFF),
        patched(MADE["h264 mp4"], b"elst", 4, 0x7FFFFFFF),
        b"\0" * 4 + b"ftyp" + bytes(containers.MAX_VIDEO_BYTES - 7),
    ],
    ids=["stsz", "trun", "elst", "bytes"],
)
def test_counts_that_would_take_memory_are_refused_before_ffmpeg(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("FFmpeg was asked"))
    with pytest.raises(BadSample) as error:
        probe_video(data)
    assert error.value.reason is Reason.VIDEO_TOO_LARGE


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_CLIP_BYTES", 3 * 96 * 64 * 9)
    assert len(decode_video(MADE["h264 mp4"], SIZE, frames=9)) == 9
    with pytest.raises(BadSample) as error:
        decode_video(MADE["h264 mp4"], SIZE, frames=13)
    assert error.value.reason is Reason.VIDEO_TOO_LARGE
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 96 * 64 - 1)
    assert refused(MADE["h264 mp4"]) is Reason.VIDEO_TOO_LARGE
    monkeypatch.undo()
    for module, name in ((containers, "h264 mp4"), (video, "h264 mkv")):
        monkeypatch.setattr(module, "MAX_VIDEO_FRAMES", 39)
        assert refused(MADE[name]) is Reason.VIDEO_TOO_LARGE


def test_ffmpeg_sees_only_the_first_video_track() -> None:
    """Sound, metadata and data references are marked as free space; an external file is never asked for."""
    data = MADE["mov with sound"]
    format, file = containers.checked(data)
    left = file.getvalue()
    assert format == "mov" and len(left) == len(data)
    before, after = boxes(data), boxes(left)
    assert before.count(b"trak") == 2 and after.count(b"trak") == 1
    assert {b"dref", b"smhd", b"vmhd", b"stsz"} <= set(before)
    assert not {b"dref", b"smhd", b"udta", b"meta"} & set(after) and {b"vmhd", b"stsz"} <= set(after)
    with av.open(file, format=format) as source:
        assert [stream.type for stream in source.streams] == ["video"]


@pytest.mark.parametrize("kind", [b"udta", b"meta", b"wave", b"moov", b"dinf"])
@pytest.mark.parametrize("parent", [b"moov", b"trak", b"stbl"])
def test_boxes_that_hide_in_others_are_not_left_to_ffmpeg(kind: bytes, parent: bytes) -> None:
    """FFmpeg reads a table wherever it stands, also where it has no business."""
    data = bytearray(MADE["h264 mp4"])
    hidden = box(kind, box(b"stsz", struct.pack(">III", 0, 1, 0x7FFFFFFF)))
    path = [b"moov", b"trak", b"mdia", b"minf", b"stbl"]
    places = [data.find(name) - 4 for name in path[: path.index(parent) + 1]]
    end = places[-1] + struct.unpack_from(">I", data, places[-1])[0]
    for place in places:
        struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + len(hidden))
    data[end:end] = hidden
    assert boxes(bytes(data)).count(b"stsz") == 2
    assert boxes(containers.checked(bytes(data))[1].getvalue()).count(b"stsz") == 1
    assert probe_video(bytes(data)).frames == 40


def test_without_pyav_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"dstrain\[video\]") as error:
        probe_video(MADE["h264 mp4"])
    assert not isinstance(error.value, BadSample)
