"""The quality benchmark goes without DISTS where VGG16's weights are missing."""

from benchmarks.quality import perceptual_metrics
from diffbir.utils import metrics


def test_dists_is_left_out_with_a_sentence_where_vgg16_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(metrics, "VGG16_WEIGHTS", tmp_path / "vgg16.safetensors")
    assert [type(metric) for metric in perceptual_metrics()] == [metrics.LPIPS]
    assert "DISTS is left out: weights not found" in capsys.readouterr().err


def test_dists_is_there_where_vgg16_is(vgg16):
    assert [metric.variant for metric in perceptual_metrics()] == ["LPIPS v0.1, AlexNet", "DISTS, VGG16"]
