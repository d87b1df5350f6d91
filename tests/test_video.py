"""Videos: what the tests write themselves, a drawn face that moves and a tone."""

import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceprior.detect import Face, detect_faces
from faceprior.procedural import draw_portrait
from faceprior.video import VideoError, container_suffix, follow_faces, restore_video

av = pytest.importorskip("av")

SIZE, FRAMES = (200, 160), 20
LANDMARKS = np.array([[35, 40], [65, 40], [50, 60], [38, 78], [62, 78]], np.float64)


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    return Image.fromarray(draw_portrait(3, 120).image)


def frame_of(portrait: Image.Image, number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    frame = Image.new("RGB", size, (90, 120, 150))
    frame.paste(portrait, (10 + 2 * number, 20 + round(3 * math.sin(number))))
    return frame


def write_video(path: Path, frames: list[Image.Image], rotation: int = 0, sound: str = "aac", times=None) -> Path:
    """H.264 (VP9 in WebM) with a second of 440 Hz; times: of the frames, in 1/25 s."""
    with av.open(str(path), "w") as output:
        video = output.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=25)
        video.width, video.height = frames[0].size
        video.pix_fmt = "yuv420p" if frames[0].width % 2 == 0 else "yuv444p"
        if rotation:
            video.set_display_rotation(rotation)
        tone = output.add_stream(sound, rate=48000)
        tone.layout = "mono"
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = (times or range(len(frames)))[number], Fraction(1, 25)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        wave = (np.sin(2 * np.pi * 440 * np.arange(48000) / 48000) * 8000).astype(np.int16)[None]
        for start in range(0, 47040, 960):
            samples = av.AudioFrame.from_ndarray(wave[:, start : start + 960], format="s16", layout="mono")
            samples.sample_rate, samples.pts = 48000, start
            output.mux(tone.encode(samples))
        output.mux(tone.encode(None))
    return path


def read_video(path: Path) -> tuple[list, list[bytes], list]:
    """The frames, the packets of the sound, and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        times = [round(float(packet.pts * packet.time_base), 3) for packet in packets]
        return frames, [bytes(packet) for packet in packets], times


def detect(image: Image.Image) -> list[Face]:
    return detect_faces(image, "mtcnn")


def inverted(images, faces):
    """A restorer that one cannot overlook: the inside of every box is inverted."""
    for image, found in zip(images, faces, strict=True):
        pixels = np.array(image)
        for face in found:
            x0, y0, x1, y1 = (round(edge) for edge in face.box)
            pixels[y0:y1, x0:x1] = 255 - pixels[y0:y1, x0:x1]
        yield Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_frames_times_and_sound_stay(tmp_path, portrait, suffix):
    """The background stays within what the encoder costs; the face changes in every frame, also where times jump."""
    sound, times = "libopus" if suffix == ".webm" else "aac", [*range(FRAMES - 4), 30, 31, 35, 36]
    source = write_video(
        tmp_path / f"in{suffix}", [frame_of(portrait, i) for i in range(FRAMES)], sound=sound, times=times
    )
    target = tmp_path / f"out{container_suffix(source)}"
    result = restore_video(source, target, detect, inverted)
    assert (result.frames, result.restored, result.faces, result.lost) == (FRAMES, FRAMES, 1, ())
    assert result.before.size == result.after.size == SIZE
    (before, sound_before, times_before), (after, sound_after, times_after) = read_video(source), read_video(target)
    assert len(after) == FRAMES and [f.time for f in after] == [f.time for f in before]
    assert [(f.width, f.height) for f in after] == [SIZE] * FRAMES
    assert sound_before and sound_after == sound_before and times_after == times_before
    for old, new in zip(before, after, strict=True):
        old, new = (frame.to_ndarray(format="rgb24").astype(int) for frame in (old, new))
        assert np.abs(new - old)[-12:].mean() < 3 and np.abs(new - old)[60:90].mean() > 15
    with av.open(str(source)) as first, av.open(str(target)) as second:
        assert second.streams.video[0].time_base == first.streams.video[0].time_base


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_turned_video_is_restored_upright_and_stays_turned(tmp_path, portrait, rotation):
    turns = {90: Image.ROTATE_270, 180: Image.ROTATE_180, -90: Image.ROTATE_90}
    stored = [frame_of(portrait, i).transpose(turns[rotation]) for i in range(6)]
    source = write_video(tmp_path / "in.mov", stored, rotation)
    result = restore_video(source, tmp_path / "out.mov", detect, inverted)
    assert result.restored == 6 and result.before.size == SIZE
    frames, _, _ = read_video(tmp_path / "out.mov")
    with av.open(str(tmp_path / "out.mov")) as container:
        assert container.streams.video[0].average_rate == 25
    assert {frame.rotation % 360 for frame in frames} == {rotation % 360}
    assert (frames[0].width, frames[0].height) == stored[0].size


def test_odd_sizes_stay(tmp_path, portrait):
    source = write_video(tmp_path / "in.mp4", [frame_of(portrait, i, (181, 151)) for i in range(4)])
    restore_video(source, tmp_path / "out.mp4", detect, inverted)
    assert {(frame.width, frame.height) for frame in read_video(tmp_path / "out.mp4")[0]} == {(181, 151)}


def test_a_video_without_a_face_writes_nothing(tmp_path):
    source = write_video(tmp_path / "in.mp4", [Image.new("RGB", SIZE, (i, 90, 9)) for i in range(5)])
    assert restore_video(source, tmp_path / "out.mp4", detect, inverted).restored == 0
    assert not (tmp_path / "out.mp4").exists()


def test_what_fails_leaves_no_file_and_is_named(tmp_path, portrait, monkeypatch):
    source = write_video(tmp_path / "in.mp4", [frame_of(portrait, i) for i in range(6)])

    def failing(images, faces):
        yield next(iter(images))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_video(source, tmp_path / "out.mp4", detect, failing)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]

    (tmp_path / "torn.mp4").write_bytes(source.read_bytes()[:500])
    with pytest.raises(VideoError, match="torn.mp4 cannot be read or written as a video"):
        restore_video(tmp_path / "torn.mp4", tmp_path / "out.mp4", detect, inverted)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install faceprior\[video\]"):
        restore_video(source, tmp_path / "out.mp4", detect, inverted)


def test_a_video_whose_frames_are_all_damaged_is_an_error(tmp_path, portrait):
    source = write_video(tmp_path / "in.mkv", [frame_of(portrait, i) for i in range(6)])
    data = source.read_bytes()
    start = data.index(b"\x1f\x43\xb6\x75") + 40  # the first cluster, whose first frame is left in part
    (tmp_path / "torn.mkv").write_bytes(data[:start])
    with pytest.raises(VideoError, match=r"torn.mkv has no frame that can be decoded: it is damaged"):
        restore_video(tmp_path / "torn.mkv", tmp_path / "out.mkv", detect, inverted)


def test_colours_of_rgb_with_transparency(tmp_path, portrait):
    """The result is YUV, and says no more that it is RGB; that it is opaque, and has one picture of two, is said."""
    with av.open(str(tmp_path / "in.mov"), "w") as output:
        streams = [output.add_stream("png", rate=25) for _ in range(2)]
        for video in streams:
            video.width, video.height, video.pix_fmt = *SIZE, "rgba"
        for number in range(6):
            for video in streams:
                frame = av.VideoFrame.from_image(frame_of(portrait, number)).reformat(format="rgba")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                output.mux(video.encode(frame))
        for video in streams:
            output.mux(video.encode(None))
    result = restore_video(tmp_path / "in.mov", tmp_path / "out.mov", detect, inverted)
    assert result.restored == 6 and result.lost == ("transparency", "1 further video stream")
    with av.open(str(tmp_path / "out.mov")) as container:
        (frame, *_) = container.decode(video=0)
    assert frame.colorspace != 0 and frame.format.name.startswith("yuv")
    corner = frame.to_ndarray(format="rgb24")[-4:, -4:].astype(int)
    assert np.abs(corner - (90, 120, 150)).max() <= 4


def test_the_suffix_of_a_restored_video():
    suffixes = [container_suffix(f"a{suffix}") for suffix in (".mp4", ".MOV", ".webm", ".mkv", ".avi", ".wmv")]
    assert suffixes == [".mp4", ".mov", ".webm", ".mkv", ".mkv", ".mkv"]


# ---- faces over time


def face_at(offset, jitter=0.0, landmarks=True) -> Face:
    points = LANDMARKS + offset + jitter
    x, y = np.broadcast_to(np.asarray(offset, float), 2)
    return Face((20 + x, 20 + y, 80 + x, 95 + y), points if landmarks else None, 0.99)


GREY = np.full((36, 64, 3), 128, np.uint8)


def landmark_steps(tracks: list[list[Face]]) -> float:
    """The jitter: root mean square of the second difference over time of the largest face's landmarks, in pixels."""
    points = np.stack([faces[0].landmarks for faces in tracks])
    return float(np.sqrt((np.diff(points, 2, axis=0) ** 2).mean()))


def test_landmarks_tremble_less_and_do_not_lag():
    """A face that moves by (3, 1) pixels a frame, found with an error of 1 pixel (standard deviation)."""
    random = np.random.default_rng(0)
    truth = [LANDMARKS + np.array([3.0, 1.0]) * i for i in range(40)]
    found = [(GREY, [face_at(np.array([3.0, 1.0]) * i, random.normal(0, 1, (5, 2)))]) for i in range(40)]
    raw, smooth = follow_faces(found, smoothing=0), follow_faces(found)
    assert landmark_steps(smooth) < landmark_steps(raw) / 4
    errors = [
        np.abs(np.mean([f[0].landmarks - t for f, t in zip(tracks, truth, strict=True)], 0)).max()
        for tracks in (raw, smooth)
    ]
    assert errors[1] < errors[0] + 0.05  # no lag: the mean error is that of what was found
    distances = [
        np.mean([np.abs(f[0].landmarks - t).mean() for f, t in zip(tracks, truth, strict=True)])
        for tracks in (raw, smooth)
    ]
    assert distances[1] < distances[0] / 1.5


def test_smoothing_lowers_the_jitter_of_a_real_detector(portrait):
    frames = [np.asarray(frame_of(portrait, i)) for i in range(FRAMES)]
    found = [(frame, detect(Image.fromarray(frame))) for frame in frames]
    assert all(len(faces) == 1 for _, faces in found)
    assert landmark_steps(follow_faces(found)) < landmark_steps(follow_faces(found, smoothing=0)) / 2


def test_a_straight_motion_is_kept_exactly():
    """A line fits it without any error, at the ends and over missed frames, too."""
    found = [(GREY, [] if i in (4, 5, 6) else [face_at((2.0 * i, -i))]) for i in range(15)]
    found[9] = (GREY, [face_at((18, -9), landmarks=False)])  # without landmarks it counts as missed
    for i, (face,) in enumerate(follow_faces(found)):
        np.testing.assert_allclose(face.landmarks, LANDMARKS + (2.0 * i, -i), atol=1e-9)
        np.testing.assert_allclose(face.box, face_at((2.0 * i, -i)).box, atol=1e-9)


def test_a_long_gap_ends_a_track_and_a_flash_is_none():
    found = [(GREY, [face_at(0)] if i < 5 or i >= 20 else []) for i in range(25)]
    found[12] = (GREY, [face_at((60, 0))])
    tracks = follow_faces(found, longest_gap=10)
    assert [len(faces) for faces in tracks] == [1] * 5 + [0] * 15 + [1] * 5
    assert [len(faces) for faces in follow_faces([(GREY, [face_at(0)])] * 2)] == [1, 1]  # a video of two frames


def test_a_cut_resets_the_smoothing():
    """Two shots with a face at nearly one place: nothing of the one reaches the other."""
    other = np.full_like(GREY, 30)
    found = [(GREY if i < 8 else other, [face_at(0 if i < 8 else 8)]) for i in range(16)]
    for i, (face,) in enumerate(follow_faces(found)):
        np.testing.assert_allclose(face.landmarks, LANDMARKS + (0 if i < 8 else 8), atol=1e-9)


def test_people_keep_apart():
    """Two faces that approach each other, the larger one first in every frame."""
    found = []
    for i in range(12):
        small = Face((150 - 3 * i, 20, 200 - 3 * i, 80), LANDMARKS * 0.8 + (134 - 3 * i, 4), 0.95)
        found.append((GREY, [small, face_at((2 * i, 0))] if i % 2 else [face_at((2 * i, 0)), small]))
    for i, (large, small) in enumerate(follow_faces(found)):
        np.testing.assert_allclose(large.landmarks, LANDMARKS + (2 * i, 0), atol=1e-9)
        np.testing.assert_allclose(small.landmarks, LANDMARKS * 0.8 + (134 - 3 * i, 4), atol=1e-9)
