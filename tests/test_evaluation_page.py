"""The page of an evaluation: self-contained, complete, and right whatever the figures are."""

import base64
import copy
import io
import re
from html import unescape

import pytest
import torch
from evaluation_helpers import evaluate, tiny_pipeline, with_stand_ins
from PIL import Image

from rtlynx.evaluate import evaluation
from rtlynx.evaluate.evaluation_page import PICTURE_BYTES, findings, picture_uri, render_page
from rtlynx.evaluate.picture_metrics import METRICS


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_model", tiny_pipeline)
        results = evaluate(folder / "out", metrics=with_stand_ins())
    return results, (folder / "out" / "report.html").read_text(encoding="utf-8")


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_the_page_is_self_contained_and_complete(written):
    results, html = written
    assert not re.search(
        r"""(src|href|srcset|action|poster)\s*=\s*["']?\s*(https?:)?//""", html, re.IGNORECASE
    )
    assert not re.search(
        r"@import|url\(\s*['\"]?(https?:)?//|<script [^>]*src|<link|<iframe", html, re.IGNORECASE
    )
    images = re.findall(r'<img [^>]*src="[^>]*>', html)
    assert len(images) == 2 * (3 + 2)
    assert all('src="data:image/png;base64,' in one and re.search(r'alt="[^"]+"', one) for one in images)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for kind in ("under", "over"):
        assert set(re.findall(rf'data-{kind}="([^"]+)"', html)) < set(ids)
    sliders = re.findall(r"<input [^>]*>", html)
    assert len(sliders) == 2
    assert all('type="range"' in one and re.search(r'aria-label="[^"]+"', one) for one in sliders)
    text = unescape(re.sub(r"<[^>]+>", "", html))
    for said in (*findings(results), *results["prompts"], *results["unavailable"].values()):
        assert said in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().split()


def test_shown_pictures_and_differences_are_those_that_were_drawn(written):
    pictures = {name: torch.rand(3, 16, 16) for name in ("dense", "dense-fp8", "sparse")}
    results = {**written[0], "images": 1}
    html = render_page(results, [pictures], METRICS[:2])
    found = [decoded(uri) for uri in re.findall(r'<img [^>]*src="(data:[^"]+)"', html)]
    expected = [
        *pictures.values(),
        *(4 * (pictures[key] - pictures["dense"]).abs() for key in list(pictures)[1:]),
    ]
    for image, picture in zip(found, expected, strict=True):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3)
        assert torch.equal(pixels, (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0))


def test_dense_steps_that_calibration_compared_are_plotted(written):
    results, html = written
    assert "Dense last steps" not in html
    compared = [
        {"last_steps": last, "steps": 28, "error": error, "time": 0.5, "chosen": last == 2}
        for last, error in ((0, 1e-3), (2, 1e-4), (4, None))
    ]
    variants = [row | {"dense_steps": compared} for row in results["variants"]]
    pictures = {name: torch.rand(3, 16, 16) for name in ("dense", "dense-fp8", "sparse")}
    html = render_page({**results, "images": 1, "variants": variants}, [pictures], METRICS[:2])
    (plot,) = re.findall(r'<figure class="plot"><img src="(data:[^"]+)"', html)
    assert decoded(plot).width > 600


def test_large_pictures_are_compressed_to_what_is_allowed():
    noise = torch.rand(3, 512, 640, generator=torch.Generator().manual_seed(0))
    soft = torch.linspace(0, 1, 640).expand(3, 512, 640)
    for picture, most in ((noise, 100_000), (soft, PICTURE_BYTES)):
        uri = picture_uri(picture, most)
        assert uri.startswith("data:image/webp;base64,")
        assert decoded(uri).size == (640, 512)
        assert len(uri) < 1.4 * most


def test_what_prints_the_same_is_not_better(written):
    results = copy.deepcopy(written[0])
    _, fp8, sparse = results["variants"]
    fp8["psnr"], sparse["psnr"] = 30.001, 30.002
    fp8["ssim"], sparse["ssim"] = 0.9, 0.8
    html = render_page(
        results, [{row["name"]: torch.rand(3, 8, 8) for row in results["variants"]}], METRICS[:2]
    )
    assert re.findall(r'class="best"><span>([^<]+)<', html) == ["0.900"]


def test_prompts_are_text_and_not_markup(written):
    results = copy.deepcopy(written[0])
    results["prompts"][0] = '<b onclick="x()">bold</b> & "quoted"'
    html = render_page(
        results, [{row["name"]: torch.rand(3, 8, 8) for row in results["variants"]}], METRICS[:2]
    )
    assert "<b onclick" not in html
    assert "&lt;b onclick" in html


def test_findings_hold_whatever_the_figures_are(written):
    results = copy.deepcopy(written[0])
    rows = {row["name"]: row for row in results["variants"]}
    rows["sparse"]["psnr"], rows["dense-fp8"]["psnr"] = 30.0, 28.0
    assert "2.0\N{NO-BREAK SPACE}dB nearer than those of dense fp8" in findings(results)[0]
    rows["dense-fp8"]["psnr"] = 30.01
    assert "as near as those of dense fp8" in findings(results)[0]
    rows["sparse"]["psnr"] = None
    assert "equals the dense one" in findings(results)[0]

    results["simulated"] = False
    for name, seconds, peak in (("dense", 3.0, 34e9), ("dense-fp8", 2.0, 22e9), ("sparse", 1.5, 21e9)):
        rows[name]["seconds"], rows[name]["peak_memory_bytes"] = seconds, peak
    speed = findings(results)[1].replace("\N{NO-BREAK SPACE}", " ")
    assert "3 s dense, 2 s in dense fp8 and 1.5 s sparse" in speed
    assert "2.00 times as fast as dense and 1.33 times as fast as dense fp8" in speed
    assert "peaks at 21.0 GB instead of 34.0 GB" in speed

    rows["dense"]["image_reward"], rows["sparse"]["image_reward"] = 0.5, -0.25
    assert "ImageReward goes from 0.50 dense to \N{MINUS SIGN}0.25 sparse" in findings(results)[2]
    for row in rows.values():
        row.pop("clip_score")
        row.pop("image_reward")
    assert "No network judged" in findings(results)[2]
    for row in rows.values():
        row["kid"] = 0.1
    assert "KID against real pictures goes from 0.100" in findings(results)[2]
