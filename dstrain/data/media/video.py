"""From the bytes of a video to RGB frames of the size and number that the plan counted on. Needs PyAV."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dstrain.data.media.containers import MAX_VIDEO_BYTES as MAX_VIDEO_BYTES
from dstrain.data.media.containers import MAX_VIDEO_FRAMES, checked
from dstrain.data.media.decode import CENTRE, EXCHANGED, Place, shape
from dstrain.data.media.resolution import Fit
from dstrain.data.media.timing import Timing, available_frames
from dstrain.data.media.timing import clip_frames as clip_frames
from dstrain.data.reasons import BadSample, Reason
from dstrain.errors import DataError

MAX_FRAME_PIXELS = 1 << 25  # 8K; a decoder holds up to 16 frames, of 50 MB then
MAX_CLIP_BYTES = 1 << 31
_DECODERS = "h264 hevc vp8 vp9 libdav1d av1 mpeg4 mjpeg prores".split()
_T = Image.Transpose
_TURNS = {  # signs of a, b, c, d of a display matrix: (x, y) is shown at (a x + c y, b x + d y) (ISO/IEC 14496-12)
    (-1, 0, 0, 1): _T.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): _T.ROTATE_180,
    (1, 0, 0, -1): _T.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): _T.TRANSPOSE,
    (0, 1, -1, 0): _T.ROTATE_270,
    (0, -1, -1, 0): _T.TRANSVERSE,
    (0, -1, 1, 0): _T.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Size in pixels as a video is meant to be seen, its frames, and their mean rate in 1/s (0: a single one)."""

    width: int
    height: int
    frames: int
    fps: float


def probe_video(data: bytes) -> VideoHeader:
    """Count the frames of a video, and decode the first for the size that it is meant to be seen at.

    Raises BadSample for another format, damage that shows, or a video over the limits; DataError if PyAV is missing.
    """
    first: np.ndarray | None = None
    turn: Image.Transpose | None = None
    packets: list[_Packet] = []
    with _opened(data) as clip:
        for packet in clip.packets():
            if packet.size:
                packets.append(_noted(packet, clip.codec))
            if first is None and packets:
                for frame in clip.decode(packet, packets[0].time)[:1]:
                    first, turn, start = clip.pixels(frame), _turn(frame), frame.pts
        timing = Timing((packet.time for packet in packets if packet.shown), clip.stream.time_base)
    if first is None or start != timing.times[0]:
        raise BadSample(Reason.VIDEO_DAMAGED, "its first frame cannot be decoded")
    height, width = first.shape[:2]
    width, height = (height, width) if turn in EXCHANGED else (width, height)
    return VideoHeader(width, height, len(timing.times), timing.fps)


def decode_video(
    data: bytes,
    size: tuple[int, int],
    *,
    frames: int,
    fps: float = 0.0,
    start: float = 0.0,
    fit: Fit = "scale",
    place: Place = CENTRE,
    flip: bool = False,
) -> Tensor:
    """Decode a clip of a video to uint8 RGB [F, 3, H, W]; `size` is (W, H), and F what `clip_frames` says of `frames`.

    fps: frames a second that it is resampled to, each the one that is shown nearest in time; 0 takes all.
    start: which of the possible first frames is taken, in [0, 1). fit, place, flip: as of pictures, one for all frames.
    Raises BadSample if a frame that is wanted cannot be decoded without damage.
    """
    with _opened(data) as clip:
        packets = [_noted(packet, clip.codec) for packet in clip.packets() if packet.size]
        timing = Timing((packet.time for packet in packets if packet.shown), clip.stream.time_base)
    available = int(available_frames(len(timing.times), timing.fps, fps))
    count = int(clip_frames(len(timing.times), timing.fps, frames, fps))
    if count * 3 * size[0] * size[1] > MAX_CLIP_BYTES:
        raise BadSample(Reason.VIDEO_TOO_LARGE, f"a clip of {count} x {size[0]} x {size[1]} pixels; give fewer frames")
    first = min(int(start * (available - count + 1)), available - count)
    times = timing.nearest(range(first, first + count), fps)
    out = np.empty((count, 3, size[1], size[0]), np.uint8)
    # What follows a key frame in both orders needs nothing before it, or no more than what its neighbours refer to.
    keys = [number for number, packet in enumerate(packets) if packet.key and packet.time <= times[0]]
    for begin in dict.fromkeys([*keys[:-3:-1], 0]):
        sure = packets[keys[-1] if begin else 0].time
        with contextlib.suppress(BadSample) if begin else contextlib.nullcontext():
            for number, pixels, turn in _decoded(data, begin, sure, times):
                out[number] = shape(pixels, size, fit, place, turn, flip)
            return torch.from_numpy(out)
    raise AssertionError("the last attempt returns or raises")


def _decoded(
    data: bytes, begin: int, sure: int, times: list[int]
) -> Iterator[tuple[int, np.ndarray, Image.Transpose | None]]:
    """Decode from packet number `begin` on; yield the place of each wanted time in the clip, with its frame.

    Raises BadSample if one is missing, or anything from time `sure` on is damaged.
    """
    wanted: dict[int, list[int]] = {}
    for place, time in enumerate(times):
        wanted.setdefault(time, []).append(place)
    size: tuple[int, ...] | None = None
    with _opened(data) as clip:
        for packet in islice(clip.packets(), begin, None):
            for frame in clip.decode(packet, sure):
                if frame.pts not in wanted:
                    continue
                pixels, turn = clip.pixels(frame), _turn(frame)
                if pixels.shape != (size or pixels.shape):
                    raise BadSample(Reason.VIDEO_DAMAGED, "its frames have several sizes")
                size = pixels.shape
                for place in wanted.pop(frame.pts):
                    yield place, pixels, turn
            if not wanted:
                return
    raise BadSample(Reason.VIDEO_DAMAGED, f"{len(wanted)} of {len(set(times))} frames cannot be decoded")


@dataclass(frozen=True, slots=True)
class _Packet:
    time: int  # of presentation, in units of the stream's time base
    key: bool
    shown: bool


def _noted(packet: Any, codec: str) -> _Packet:
    if packet.is_corrupt or packet.pts is None:
        raise BadSample(Reason.VIDEO_DAMAGED, "a frame is cut off or has no time")
    hidden = codec == "vp8" and not bytes(packet)[0] & 0x10  # show_frame (RFC 6386, 9.1); only a reference for others
    return _Packet(packet.pts, packet.is_keyframe, not packet.is_discard and not hidden)


class _Clip:
    """An open container and its first video stream."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self.stream = container.streams.video[0]
        context = self.stream.codec_context
        self.codec = context.name
        if self.codec not in _DECODERS:
            raise BadSample(Reason.VIDEO_FORMAT, f"codec {self.codec!r} is not read")
        _check_pixels(context.width, context.height)
        context.thread_type, context.thread_count = "NONE", 1  # memory and results do not depend on the machine
        context.options = _options()

    def packets(self) -> Iterator[Any]:
        """Yield the stream's packets, and at last an empty one that makes the decoder give what it holds."""
        for number, packet in enumerate(self.container.demux(self.stream)):
            if number > MAX_VIDEO_FRAMES:
                raise BadSample(Reason.VIDEO_TOO_LARGE, f"more than {MAX_VIDEO_FRAMES} frames")
            yield packet

    def decode(self, packet: Any, sure: int) -> list[Any]:
        """Decode a packet to its frames; what is shown before time `sure` may fail, what is not raises."""
        try:
            frames = packet.decode()
        except Exception:
            if packet.pts is not None and packet.pts < sure:
                return []
            raise
        if any(frame.is_corrupt and frame.pts >= sure for frame in frames):
            raise BadSample(Reason.VIDEO_DAMAGED, "a frame is damaged")
        return list(frames)

    def pixels(self, frame: Any) -> np.ndarray:
        """Return a frame as uint8 [h, w, 3], its pixels made square."""
        ratio = self.stream.sample_aspect_ratio or Fraction(1)
        width = max(1, round(frame.width * ratio))
        _check_pixels(width, frame.height)
        return frame.to_ndarray(format="rgb24", width=width, threads=1)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[_Clip]:
    """Open a video, with every name, protocol and decoder shut that is not needed; FFmpeg's errors become BadSample."""
    try:
        import av
    except ImportError as error:
        raise DataError("videos need PyAV, which is not installed; pip install 'dstrain[video]'") from error
    kind, file = checked(data)
    only = {"codec_whitelist": ",".join(_DECODERS), "protocol_whitelist": "none"}
    try:
        with av.open(
            file,
            format=kind,
            options=_options(),
            container_options=only,
            metadata_errors="replace",
            io_open=_refuse,
        ) as container:
            yield _Clip(container)
    except (DataError, AssertionError):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise
        raise BadSample(Reason.VIDEO_DAMAGED, f"it cannot be decoded: {error}") from error


def _options() -> dict[str, str]:
    return {"max_pixels": str(MAX_FRAME_PIXELS), "err_detect": "explode", "threads": "1"}


def _refuse(url: str, flags: int, options: dict[str, str]) -> None:
    raise BadSample(Reason.VIDEO_FORMAT, "it refers to another file")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise BadSample(Reason.VIDEO_TOO_LARGE, f"{width} x {height} pixels, more than {MAX_FRAME_PIXELS}")


def _turn(frame: Any) -> Image.Transpose | None:
    """Return what makes a frame upright."""
    for entry in frame.side_data:
        if entry.type.name == "DISPLAYMATRIX":
            matrix = np.sign(np.frombuffer(bytes(entry), np.int32))
            return _TURNS.get(tuple(matrix[[0, 1, 3, 4]].tolist()))
    return None
