"""See :func:`seen_page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from jdkd.report.layout import laid_out, made
from jdkd.report.pictures import Panel, detected, missed, picture_row, truth_panel
from jdkd.run_folder import versions
from jdkd.train.image_scores import OVERLAP, JudgedImage, f1, worst_first

RULE = (
    f"Solid: a true box of that class is there (IoU from {OVERLAP:g}, each found once, the most confident detection "
    "first); dashed: none is; dotted: a true box that nothing finds; faint: inside a crowd region, which does not "
    "count. Numbers beside a class are scores. An image's score is its F1, the harmonic mean of precision and recall "
    "(1 where there is nothing to find and nothing is found)"
)


@dataclass(frozen=True)
class Sight:
    """What one detector finds.

    Args:
        title: its name on the page.
        images: of every image, what it finds there.
        threshold: score from which a detection counts.
    """

    title: str
    images: Sequence[JudgedImage]
    threshold: float

    def sentence(self) -> str:
        """What it comes to on all images."""
        counts = [sum(each) for each in zip(*(one.counts(self.threshold) for one in self.images), strict=True)]
        found, lost, wrong = counts
        return (
            f"{self.title} finds {found:,} of {found + lost:,} boxes on {len(self.images):,} "
            f"image{'s' * (len(self.images) != 1)}, and {wrong:,} detection{' is' if wrong == 1 else 's are'} wrong: "
            f"F1 {f1(*counts):.3f} from a score of {self.threshold:.3g} on."
        )

    def panel(self, place: int, target: Mapping[str, Any], classes: Sequence[str]) -> Panel:
        """What it finds on one image."""
        one = self.images[place]
        found, lost, wrong = one.counts(self.threshold)
        drawn = missed(one, target, self.threshold) + detected(one, classes)[: one.above(self.threshold)]
        words = f"F1 {one.f1(self.threshold):.2f}; {found} found, {lost} missed, {wrong} wrong"
        return Panel(self.title, drawn, words)


def seen_page(dataset: Any, sights: Sequence[Sight], count: int, *, responses: str = "", command: Sequence[str]) -> str:
    """What detectors find beside what there is to find, the images on which the first does worst on top.

    Args:
        dataset: the images, in the order of the sights'.
        sights: of one detector or several.
        count: how many images are shown at most.
        responses: HTML of :func:`jdkd.report.responses.responses_section`.
        command: how the page was made.

    Returns:
        A page that stands alone.
    """
    first = sights[0]
    order = worst_first(first.images, first.threshold)[:count]
    rows = []
    for place in order:
        image, target = dataset[place]
        panels = [truth_panel(target, dataset.classes), *(one.panel(place, target, dataset.classes) for one in sights)]
        name = dataset.sizes[place][0]
        rows.append(f"<h3>{escape(name)}</h3>{picture_row(image, panels, f'seen-{place}', name)}")
    whose = f", the lowest of {first.title} first" if len(sights) > 1 else ", the lowest first"
    left = len(first.images) - len(order)
    more = f" {left:,} more image{' is' if left == 1 else 's are'} not shown." if left else ""
    facts = {"images": dataset.split.images, "annotations": dataset.split.annotations} | versions()
    sections = {
        "images": ("The worst images", f'<p class="faint">{escape(RULE + whose)}.{more}</p>{"".join(rows)}'),
        "responses": ("What the channels respond to", responses),
        "made": ("How it was made", made(command, facts)),
    }
    return laid_out(_title(sights), [one.sentence() for one in sights], sections)


def _title(sights: Sequence[Sight]) -> str:
    names = [one.title for one in sights]
    return f"What {' and '.join(names)} see{'s' * (len(names) == 1)}"
