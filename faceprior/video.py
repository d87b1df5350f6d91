"""Videos: every face followed over the frames, the frames restored one after the other, the sound copied.

A face that is found anew in every frame trembles: a detector's landmarks jump by a pixel or two, and the restored face
with them. `follow_faces` joins the faces of successive frames to tracks, smooths each track over time and bridges
frames in which a face was missed. `restore_video` reads a video twice: once for the tracks, which are small, and once
to restore and write it, so that it holds a few frames at a time.

PyAV, which brings FFmpeg, is imported on first use: `pip install faceprior[video]`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from faceprior.detect import SAME_FACE, Face, overlap
from faceprior.files import atomic_write
from faceprior.images import MAX_PIXELS

# Measured on the drawn face of tests/test_video.py, a standard deviation of 2 frames halves the landmarks' jitter at
# least; at 25 frames a second it blurs what is faster than 1/12 s.
SMOOTHING = 2.0  # standard deviation in frames of the weights of the neighbouring frames
LONGEST_GAP = 12  # frames in which a face may be missed before its track ends
FEWEST_FRAMES = 3  # in which a face has to be found; one that flashes up in fewer would flicker
CUT = 25.0  # mean difference of two frames' colours, of 255, above which the second begins another shot
MOST_PIXELS = 16384  # on a side, of H.264 and VP9

CONTAINERS = {".m4v": "mp4", ".mov": "mov", ".mp4": "mp4", ".webm": "webm"}  # any other becomes Matroska
_ENCODERS = {
    "libx264": {"crf": "18", "preset": "medium"},
    "libopenh264": {"b": "12M"},
    "libvpx-vp9": {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"},
    "mpeg4": {"q:v": "2"},
}


class VideoError(ValueError):
    """A video that cannot be read or written; the message names file, rule and way out."""


# ---- faces over time


@dataclass
class _Track:
    """One person in one shot: the frames in which a face was found, and the faces."""

    frames: list[int] = field(default_factory=list)
    faces: list[Face] = field(default_factory=list)

    def add(self, frame: int, face: Face) -> None:
        self.frames.append(frame)
        self.faces.append(face)


def follow_faces(
    frames: Iterable[tuple[np.ndarray, list[Face]]],
    smoothing: float = SMOOTHING,
    longest_gap: int = LONGEST_GAP,
) -> list[list[Face]]:
    """Turn the faces that were found in each frame into the faces to restore in it, largest first.

    frames: per frame its pixels, (H, W, 3) uint8, of which only the difference to the frame before is looked at, and
    its faces; one without landmarks counts as not found. A face belongs to the track whose last box it overlaps most,
    above `detect.SAME_FACE`; tracks end at cuts and after `longest_gap` frames. Between its first and its last frame a
    track has a face in every frame: box and landmarks are the value at that frame of the straight line that fits its
    neighbours best, weighted by a Gaussian of `smoothing` frames (0: as they were found). A line does not lag behind a
    face that moves, and the future counts as much as the past.
    """
    ended: list[_Track] = []
    active: list[_Track] = []
    starts, last, count = [0], None, 0
    for number, (pixels, faces) in enumerate(frames):
        count, small = number + 1, _thumbnail(pixels)
        if last is not None and np.abs(small - last).mean() > CUT:
            ended, active = ended + active, []
            starts.append(number)
        last = small
        ended += [track for track in active if number - track.frames[-1] > longest_gap + 1]
        active = [track for track in active if number - track.frames[-1] <= longest_gap + 1]
        active += _matched(active, number, [face for face in faces if face.landmarks is not None])
    found: list[list[Face]] = [[] for _ in range(count)]
    for track in ended + active:
        start = max(start for start in starts if start <= track.frames[0])
        shot = next((later for later in starts if later > start), count) - start
        if len(track.frames) >= min(FEWEST_FRAMES, shot):
            for number, face in _smoothed(track, smoothing):
                found[number].append(face)
    return [sorted(faces, key=lambda face: face.area, reverse=True) for faces in found]


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    """The mean colours of a frame on a grid of 32 x 18: (18, 32, 3) float32."""
    return np.asarray(Image.fromarray(pixels).resize((32, 18), Image.BOX), np.float32)


def _matched(tracks: list[_Track], number: int, faces: list[Face]) -> list[_Track]:
    """Add the faces to the tracks that they continue, the best overlaps first; return the tracks that others begin."""
    pairs = [(overlap(t.faces[-1].box, f.box), i, j) for i, t in enumerate(tracks) for j, f in enumerate(faces)]
    free_tracks, free_faces = set(range(len(tracks))), set(range(len(faces)))
    for share, i, j in sorted(pairs, reverse=True):
        if share > SAME_FACE and i in free_tracks and j in free_faces:
            tracks[i].add(number, faces[j])
            free_tracks.remove(i)
            free_faces.remove(j)
    return [_Track([number], [faces[j]]) for j in sorted(free_faces)]


def _smoothed(track: _Track, smoothing: float) -> Iterator[tuple[int, Face]]:
    """The faces of a track in all its frames, also in those in which it was missed."""
    times = np.array(track.frames, np.float64)
    values = np.stack([np.concatenate([face.box, face.landmarks.ravel()]) for face in track.faces])  # (N, 14)
    confidences = np.array([face.confidence for face in track.faces])
    for number in range(track.frames[0], track.frames[-1] + 1):
        nearest = int(np.abs(times - number).argmin())
        if smoothing == 0 and times[nearest] == number:
            value = values[nearest]
        else:
            value = _local_line(times - number, values, max(smoothing, 0.5))
        x0, y0, x1, y1 = value[:4]
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        yield number, Face(box, value[4:].reshape(5, 2), confidences[nearest])


def _local_line(offsets: np.ndarray, values: np.ndarray, sigma: float) -> np.ndarray:
    """The value at offset 0 of the weighted least-squares line through values (N, D): (D,).

    The weights are exp(-t^2 / (2 s^2)), with s widened over a gap so that both its sides count.
    """
    before, after = -offsets[offsets <= 0], offsets[offsets >= 0]
    reach = max(before.min(initial=np.inf), after.min(initial=np.inf))
    sigma = max(sigma, reach if np.isfinite(reach) else 0)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    near = weights > 1e-4
    t, w, v = offsets[near], weights[near, None], values[near]
    mean_t = (w[:, 0] * t).sum() / w.sum()
    mean_v = (w * v).sum(0) / w.sum()
    spread = (w[:, 0] * (t - mean_t) ** 2).sum()
    slope = (w * (t - mean_t)[:, None] * (v - mean_v)).sum(0) / spread if spread > 1e-9 else 0.0
    return mean_v - slope * mean_t


# ---- a video


@dataclass(frozen=True)
class RestoredVideo:
    """What was done: the number of frames, of those with a restored face, and of the people that were followed.

    lost: what the result does not hold of the video, in words. before, after: the frame with the largest face.
    """

    frames: int
    restored: int
    faces: int
    lost: tuple[str, ...] = ()
    before: Image.Image | None = None
    after: Image.Image | None = None


def container_suffix(path: str | Path) -> str:
    """The suffix of a restored video: that of the video where H.264 or VP9 and its sound fit in, else .mkv."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in CONTAINERS else ".mkv"


def restore_video(
    path: str | Path,
    target: str | Path,
    detect: Callable[[Image.Image], list[Face]],
    restore: Callable[[Iterable[Image.Image], list[list[Face]]], Iterable[Image.Image]],
    smoothing: float = SMOOTHING,
) -> RestoredVideo:
    """Restore the faces of a video and write it with the same size, time stamps, rotation and sound, whole or not at
    all.

    detect: finds the faces of an upright frame. restore: maps upright frames, and the faces of each, to restored frames
    of the same size, lazily and in order. target: its suffix names the container (see `container_suffix`). The picture
    is encoded as H.264 (VP9 in WebM), where PyAV has it; sound is copied packet by packet. Without any face nothing is
    written.

    Raises ImportError without PyAV, VideoError for a file that is no video, is damaged, or has too large frames.
    """
    path, target = Path(path), Path(target)
    with _named(path):
        tracks = follow_faces(_detected(path, detect), smoothing)
        if not tracks:
            raise VideoError(f"{path} has no frame that can be decoded: it is damaged, copy it again, or leave it out")
        if not any(tracks):
            return RestoredVideo(len(tracks), 0, 0)
        return _write(path, target, tracks, restore)


def _detected(path: Path, detect: Callable[[Image.Image], list[Face]]) -> Iterator[tuple[np.ndarray, list[Face]]]:
    with _open(path) as container:
        stream = _picture(container, path)
        for frame in _decoded(container.demux(stream)):
            image = _upright(frame)
            yield np.asarray(image), detect(image)


def _write(path: Path, target: Path, tracks: list[list[Face]], restore: Callable) -> RestoredVideo:
    av = _import_av()
    with (
        atomic_write(target) as file,
        _open(path) as container,
        av.open(file, "w", format=CONTAINERS.get(target.suffix.lower(), "matroska")) as output,
    ):
        # ---- the streams of the result: the picture, encoded anew, and copies of the sound
        stream = _picture(container, path)
        first = _first_frame(path)
        lost = _lost(container, first)  # now: a closed container has no streams
        encoder = _add_encoder(output, stream, first, target)
        sounds = {s.index: output.add_stream_from_template(s) for s in container.streams.audio}
        output.metadata.update(container.metadata)
        if first.rotation:
            encoder.set_display_rotation(first.rotation)
        waiting: deque[tuple[Any, Image.Image]] = deque()

        def images() -> Iterator[Image.Image]:
            for frame in _decoded(_copied(container.demux(stream, *container.streams.audio), sounds, output)):
                if (frame.width, frame.height) != (first.width, first.height):
                    raise VideoError(f"{path} changes its size at {frame.time:.2f} s: split it there first")
                image = _upright(frame)
                waiting.append((frame, image))
                yield image

        # ---- restore and encode, as the frames come
        largest = max(range(len(tracks)), key=lambda i: max((face.area for face in tracks[i]), default=0))
        shown: tuple[Image.Image | None, Image.Image | None] = (None, None)
        for number, image in enumerate(restore(images(), tracks)):
            frame, before = waiting.popleft()
            if number == largest:
                shown = before, image
            output.mux(encoder.encode(_encodable(image, frame, encoder.pix_fmt, number)))
        output.mux(encoder.encode(None))
    with_faces = sum(bool(faces) for faces in tracks)
    people = max(len(faces) for faces in tracks)
    return RestoredVideo(len(tracks), with_faces, people, lost, *shown)


def _add_encoder(output: Any, stream: Any, first: Any, target: Path) -> Any:
    """Add the stream of the picture with the size, rate, time base and colours of the original one."""
    av = _import_av()
    largest = max(first.width, first.height)
    if largest > MOST_PIXELS or first.width * first.height > MAX_PIXELS:
        raise VideoError(f"{target} would have frames of {first.width}x{first.height} pixels: shrink the video first")
    wanted = ("libvpx-vp9",) if target.suffix.lower() == ".webm" else ("libx264", "libopenh264", "mpeg4")
    name = next((name for name in wanted if _has_encoder(av, name)), None)
    if name is None:
        raise VideoError(f"{target}: this PyAV has no encoder for it ({', '.join(wanted)}): convert the video to MP4")
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    encoder = output.add_stream(name, rate=rate, options=_ENCODERS[name])
    encoder.width, encoder.height = first.width, first.height
    is_even = first.width % 2 == 0 and first.height % 2 == 0
    encoder.pix_fmt = "yuv420p" if is_even else "yuv444p"  # half the chroma does not fit an odd side
    encoder.time_base = encoder.codec_context.time_base = stream.time_base
    if stream.sample_aspect_ratio:
        encoder.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio
    for key in ("colorspace", "color_primaries", "color_trc"):
        value = getattr(stream.codec_context, key)
        if (key, value) != ("colorspace", _RGB):  # which no YUV has: players would show it green and pink
            setattr(encoder.codec_context, key, value)
    return encoder


def _first_frame(path: Path) -> Any:
    with _open(path) as container:
        return next(_decoded(container.demux(_picture(container, path))))


def _copied(packets: Iterable[Any], sounds: dict[int, Any], output: Any) -> Iterator[Any]:
    """Write the packets of the sound as they come; yield those of the picture."""
    for packet in packets:
        if packet.stream.index not in sounds:
            yield packet
        elif packet.dts is not None:  # the last one of a stream is empty
            packet.stream = sounds[packet.stream.index]
            output.mux(packet)


def _decoded(packets: Iterable[Any]) -> Iterator[Any]:
    """The frames of the picture's packets; a damaged packet is left out, as players do."""
    av = _import_av()
    for packet in packets:
        try:
            yield from packet.decode()
        except av.InvalidDataError:
            continue


def _upright(frame: Any) -> Image.Image:
    """A frame as it is shown, in RGB."""
    image = frame.to_image(src_colorspace=_matrix(frame))
    turns = round(frame.rotation / 90) % 4  # counter-clockwise
    return image.transpose(_TURNS[turns]) if turns else image


def _encodable(image: Image.Image, frame: Any, pix_fmt: str, number: int) -> Any:
    """A restored frame in the layout, colours and time of the original one."""
    av = _import_av()
    turns = -round(frame.rotation / 90) % 4
    image = image.convert("RGB")
    made = av.VideoFrame.from_image(image.transpose(_TURNS[turns]) if turns else image)
    made = made.reformat(format=pix_fmt, dst_colorspace=_matrix(frame))
    made.pts, made.time_base = frame.pts if frame.pts is not None else number, frame.time_base
    made.duration = frame.duration
    return made


_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
_RGB, _BT709 = 0, 1  # FFmpeg's numbers of no colour matrix, and of that of HD video


def _matrix(frame: Any) -> str:
    return "ITU709" if frame.colorspace == _BT709 else "ITU601"


def _lost(container: Any, first: Any) -> tuple[str, ...]:
    lost = []
    bits = max((component.bits for component in first.format.components), default=8)
    if bits > 8:
        lost.append(f"{bits} bits per channel")
    if any(component.is_alpha for component in first.format.components):
        lost.append("transparency")
    kinds = Counter(stream.type for stream in container.streams if stream.type not in ("video", "audio"))
    if len(container.streams.video) > 1:
        kinds["further video"] = len(container.streams.video) - 1
    return (*lost, *(f"{count} {kind} stream{'s' * (count > 1)}" for kind, count in kinds.items()))


# ---- PyAV


def _import_av() -> ModuleType:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ImportError(f"videos need PyAV ({error}): pip install faceprior[video]") from error


def _open(path: Path) -> Any:
    return _import_av().open(str(path), metadata_errors="replace")


def _picture(container: Any, path: Path) -> Any:
    """The stream of the picture, which is not a cover of a sound file."""
    av = _import_av()
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    raise VideoError(f"{path} holds no video stream: leave it out")


def _has_encoder(av: ModuleType, name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the video in what FFmpeg reports."""
    av = _import_av()
    try:
        yield
    except VideoError:
        raise
    except av.FFmpegError as error:
        text = error.strerror or type(error).__name__
        raise VideoError(f"{path} cannot be read or written as a video ({text}): convert it to MP4") from error
