"""Makes the pictures of the playground that the documents show, from a running service:

    python examples/preferences.py outputs/pictures
    rayward train --config examples/quickstart.yaml --data.train outputs/pictures/train.jsonl \\
        --output-dir outputs/pictures/fruits
    rayward serve outputs/pictures/fruits/export --name fruits --num-replicas 2
    python tests/playground_pictures.py http://127.0.0.1:8000 docs/images --font Inter

The rewards are the service's; the distributions of the monitoring tab are an example's, since a
policy that has drifted takes longer to make than a picture.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from browser import headless
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

PROMPT = "Could you name two fruits for a quiz?"
COMPLETIONS = [
    "Of course! I would pick apples and plums. Enjoy!",
    "Of course! I would pick apples and hammers. Enjoy!",
    "Ugh, not again. I would pick owls and saws.",
]
SIZE = {"width": 1280, "height": 900}
# Chromium's system-ui is what the desktop says, and a server has none.
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <include>/etc/fonts/fonts.conf</include>
  {matches}
</fontconfig>
"""
MATCH = """<match target="pattern">
    <test name="family"><string>{family}</string></test>
    <edit name="family" mode="prepend" binding="strong"><string>{font}</string></edit>
  </match>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--font", help="family that stands for the desktop's own")
    arguments = parser.parse_args()
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.font:
            fonts = Path(scratch, "fonts.conf")
            families = ("sans", "sans-serif", "system-ui")
            matches = [MATCH.format(family=family, font=arguments.font) for family in families]
            fonts.write_text(FONTS.format(matches="".join(matches)))
            os.environ["FONTCONFIG_FILE"] = str(fonts)
        with headless() as browser:
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport=SIZE, color_scheme=scheme, device_scale_factor=2)
                page.route(
                    "**/v1/monitor", lambda route: route.fulfill(json=drifted(version(route)))
                )
                page.goto(f"{arguments.url}/playground")
                score(page)
                save(page, arguments.out_dir / f"playground-{scheme}.png")
                if scheme == "light":
                    page.get_by_role("tab", name="Monitoring").click()
                    page.wait_for_selector(".monitored")
                    save(page, arguments.out_dir / "playground-monitoring.png")
                page.close()


def score(page: Page) -> None:
    page.get_by_label("Text of turn 1").fill(PROMPT)
    for index, completion in enumerate(COMPLETIONS):
        page.get_by_label(f"Completion {index + 1}", exact=True).fill(completion)
    for _ in range(3):  # the first request of a service says little about its latency
        with page.expect_response("**/v1/score"):
            page.keyboard.press("Control+Enter")
        page.wait_for_selector("#cards[aria-busy=false]")
    page.evaluate("document.activeElement.blur()")
    page.locator(".card").nth(1).locator(".token", has_text="hammers").hover()
    page.wait_for_timeout(400)  # the bars grow


def save(page: Page, path: Path) -> None:
    """A picture of 256 colours: a third of the size, and nobody sees it.

    Half of them are its commonest, which are large grounds and text; half span all that it has.
    """
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    counted = sorted(picture.getcolors(picture.width * picture.height), reverse=True)
    palette = Image.new("P", (1, 1))
    spanning = picture.quantize(128, Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette.putpalette([*(level for _, colour in counted[:128] for level in colour), *spanning])
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def version(route: Route) -> str:
    label = route.request.frame.locator("#fact-version").get_attribute("aria-label") or ""
    return label.rpartition(" ")[2]


def drifted(model_version: str) -> dict[str, Any]:
    """What /v1/monitor says of a policy that has learnt to please its reward model by length."""
    edges = [-4 + 0.2 * i for i in range(41)]
    live, held_out = normal(edges, 1.12, 0.8), normal(edges, 0.0, 1.0)
    messages = {
        "drift": "The rewards differ from the held-out ones by an index of 0.91; 0.25 is much.",
        "length": "Rewards and lengths correlate by 0.62; on held-out data by 0.05.",
        "extremes": "11.8 % of the rewards lie where 2 % of the held-out ones do.",
    }
    model = {
        "model_version": model_version,
        "num_rewards": 18432,
        "mean": 1.12,
        "std": 0.8,
        "live": {"edges": edges, "shares": live},
        "held_out": {"edges": edges, "shares": held_out},
        "drift": 0.91,
        "length_correlation": 0.62,
        "share_at_extremes": 0.118,
        "warnings": [{"type": type_, "message": text} for type_, text in messages.items()],
    }
    return {"models": [model]}


def normal(edges: list[float], mean: float, std: float) -> list[float]:
    below = [0.5 * (1 + math.erf((edge - mean) / (std * math.sqrt(2)))) for edge in edges]
    return [high - low for low, high in pairwise(below)]


if __name__ == "__main__":
    main()
