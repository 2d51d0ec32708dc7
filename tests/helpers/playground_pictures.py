"""Makes the pictures of the playground that the documents show, from a running service:

    make demo
    rayward serve outputs/demo/reward-model/export --name fruits --num-replicas 2
    python tests/helpers/playground_pictures.py http://127.0.0.1:8000 docs/images --font Inter

Everything on them is the service's own: for the monitoring tab it scores what a policy might say
that has learnt to please by saying everything twice.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from browser import chromium, headless
from PIL import Image

from reward_actor import Group, RewardClient

if TYPE_CHECKING:
    from playwright.sync_api import Page

PROMPT = "Could you name two fruits for a quiz?"
COMPLETIONS = [
    "Of course! I would pick apples and plums. Enjoy!",
    "Of course! I would pick apples and hammers. Enjoy!",
    "Ugh, not again. I would pick owls and saws.",
]
NUM_PROMPTS = 1000
SIZE = {"width": 1280, "height": 980}
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
    path = chromium()
    if path is None:
        parser.error("there is no Chromium; `make browser` installs one")
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.font:
            fonts = Path(scratch, "fonts.conf")
            families = ("sans", "sans-serif", "system-ui")
            matches = [MATCH.format(family=family, font=arguments.font) for family in families]
            fonts.write_text(FONTS.format(matches="".join(matches)))
            os.environ["FONTCONFIG_FILE"] = str(fonts)
        with headless(path) as browser:
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport=SIZE, color_scheme=scheme, device_scale_factor=2)
                page.goto(f"{arguments.url}/playground")
                score(page)
                save(page, arguments.out_dir / f"playground-{scheme}.png")
                if scheme == "light":
                    drift(arguments.url)
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


def drift(url: str) -> None:
    """Score a long list of completions that say all of it twice, and some that hardly speak."""
    sys.path.insert(0, "examples")
    from preferences import DODGES, make_prompts, write_completion

    rng = random.Random(0)
    groups = []
    for prompt in make_prompts(0)[:NUM_PROMPTS]:
        completions = [" ".join(write_completion(rng, prompt, 3) for _ in "ab") for _ in range(3)]
        groups.append(Group(prompt.text, [*completions, rng.choice(DODGES)]))
    with RewardClient(url) as client:
        client.score_groups(groups)


if __name__ == "__main__":
    main()
