"""The confidence curve of appendix B: where it crosses 0.5, what m that gives, and how it is measured."""

import json
import math
import xml.dom.minidom

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_bases import build

from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.confidence import (
    ConfidenceCurve,
    Config,
    auto_time_m,
    charts,
    crossing_of,
    m_of,
    main,
    measure_confidence,
    noise_levels,
)
from faceprior.detect import Face
from faceprior.losses import time_weight
from faceprior.procedural import VALIDATION_SEEDS

SEEDS = [VALIDATION_SEEDS + number for number in range(3)]


def test_crossing_by_hand():
    """From 0.8 at t = 0.2 to 0.3 at 0.4: 0.5 lies three fifths of the way, at 0.32. The first crossing counts."""
    t = [0.0, 0.2, 0.4, 0.6, 0.8]
    assert crossing_of(t, [1.0, 0.8, 0.3, 0.7, 0.1]) == pytest.approx(0.32)
    assert crossing_of(t, [1.0, 0.9, 0.8, 0.7, 0.5]) is None  # never below
    assert crossing_of(t, [0.4, 0.9, 0.3, 0.2, 0.1]) is None  # not above without noise
    assert crossing_of(t, [0.5, 0.3, 0.3, 0.2, 0.1]) is None  # at t = 0, whose logit is no number


def test_the_papers_crossing_gives_the_papers_m():
    """t = 0.32 gives m = -0.5, whose weight peaks at 0.378; another crossing moves by as much on the logit."""
    assert m_of(0.32) == pytest.approx(-0.5)
    assert m_of(0.5) == pytest.approx(-0.5 - math.log(0.32 / 0.68))
    t = torch.linspace(0.001, 0.999, 999)
    assert t[time_weight(t, m_of(0.32)).argmax()].item() == pytest.approx(1 / (1 + math.exp(0.5)), abs=1e-3)


def test_interval_of_the_crossing():
    """Faces are lost at 0.25 or 0.45, half of each: the mean is 0.5 in between, and few faces leave that wide open."""
    t = [0.0, 0.2, 0.3, 0.4, 0.5]
    early, late = [1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]
    wide, narrow = (ConfidenceCurve.of(t, np.array([early, late, late] * n)) for n in (4, 400))
    for curve in (wide, narrow):
        assert 0.4 < curve.crossing < 0.5
        assert curve.crossing_interval[0] <= curve.crossing <= curve.crossing_interval[1]
        assert curve.m == pytest.approx(m_of(curve.crossing), abs=1e-3)
        assert all(a <= b <= c for a, b, c in zip(curve.low, curve.mean, curve.high, strict=True))
    spans = [np.ptp(curve.crossing_interval) for curve in (wide, narrow)]
    assert spans[1] < spans[0] / 3
    assert wide.n == 12 and json.loads(json.dumps(vars(wide)))["crossing"] == wide.crossing


def test_one_face_has_no_interval():
    """Two do, also where the one is never seen, so that many resampled curves begin at 0.5, or below."""
    t = [0.0, 0.2, 0.4]
    assert ConfidenceCurve.of(t, np.array([[1.0, 0.8, 0.0]])).crossing_interval is None
    curve = ConfidenceCurve.of(t, np.array([[1.0, 0.8, 0.0], [0.0, 0.0, 0.0]]))
    assert curve.crossing is None and curve.m is None


@pytest.mark.parametrize("confidences", [[[0.9, 0.9, 0.8]] * 3, [[0.3, 0.2, 0.0]] * 3])
def test_a_curve_without_a_crossing_is_refused(confidences):
    curve = ConfidenceCurve.of([0.0, 0.5, 1.0], np.array(confidences))
    assert curve.crossing is None and curve.m is None
    with pytest.raises(
        ValueError, match=r"`time_m` is auto, but .* does not fall from above to below 0.5.*Give a number"
    ):
        curve.require_m()


def test_levels_of_both_kinds_of_noise():
    """DDPM: (timestep + 0.5) / 1000. Flow: s, which the shift of 3 spreads unevenly over the timesteps."""
    timesteps, t = noise_levels(DDPMScheduler(), 4)
    assert t == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=1e-3)
    torch.testing.assert_close((timesteps + 0.5) / 1000, torch.tensor(t))
    timesteps, t = noise_levels(FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    assert t == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=2e-3)
    torch.testing.assert_close(timesteps / 1000, torch.tensor(t))


class Contrast:
    """A detector that is the surer of a face the more of the picture is dark, and counts what it has seen."""

    def __init__(self):
        self.seen = 0

    def __call__(self, image):
        self.seen += 1
        height, width = image.shape[:2]
        return [Face((0, 0, width, height), None, 0.5 + 0.5 * float((image < 128).mean()))]


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3.5"])
def test_any_base(kind, tmp_path):
    curve = measure_confidence(build(kind), SEEDS[:2], 64, tmp_path, Contrast(), levels=4)
    assert curve.noise == ("flow" if kind == "sd3.5" else "ddpm")
    assert len(curve.mean) == 5 and curve.n + curve.not_found == 2


def test_a_measurement_resumes_and_is_read_again(tmp_path):
    """The second half costs the second half; the numbers are those of a run in one go."""
    pipeline, detector = build("sdxl"), Contrast()
    whole = measure_confidence(pipeline, SEEDS, 64, tmp_path / "whole", Contrast(), levels=4)
    measure_confidence(pipeline, SEEDS[:2], 64, tmp_path / "parts", detector, levels=4)
    before = detector.seen
    assert measure_confidence(pipeline, SEEDS, 64, tmp_path / "parts", detector, levels=4) == whole
    assert detector.seen - before == before / 2


def test_the_tiny_base_loses_faces_under_noise(tmp_path, monkeypatch):
    """By MTCNN: sure without noise, blind at its end; the command leaves curve, chart and m, and reads them again."""
    monkeypatch.chdir(tmp_path)
    config = Config(output="out", num_images=3, levels=8, device="cpu")
    main(config)
    curve = ConfidenceCurve(**json.loads((tmp_path / "out/confidence.json").read_text()))
    assert curve.mean[0] > 0.9 and curve.mean[-1] == 0 and 0.05 < curve.crossing < 0.7
    drawing = xml.dom.minidom.parse("out/confidence.svg")
    assert len(drawing.getElementsByTagName("polyline")) == 3 + 1 + 2  # the curve in its band, 0.5, two weights
    assert [chart.title for chart in charts(curve)][0].endswith("n = 3")
    pipeline = load_pipeline(str(tiny.tiny_folder() / "sdxl"), weights=False)
    assert auto_time_m(pipeline, [], 128, "out") == curve.m  # nothing is measured again
    before = (tmp_path / "out/confidence.json").stat().st_mtime_ns
    main(config)
    assert (tmp_path / "out/confidence.json").stat().st_mtime_ns == before


def test_images_without_faces_are_said(tmp_path):
    with pytest.raises(ValueError, match="no face was found in any of the 2 images"):
        measure_confidence(build("sdxl"), SEEDS[:2], 64, tmp_path, lambda image: [], levels=3)
