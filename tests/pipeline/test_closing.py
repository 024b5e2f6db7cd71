"""What a search by loss leaves untold is left out of the report, not made up."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from sculpt.agents import SearchResult
from sculpt.pipeline.closing import chosen_point
from sculpt.pipeline.stages import accuracy_on_front
from sculpt.report import pareto_plot


def test_the_chosen_policy_is_drawn_where_its_accuracy_is_known() -> None:
    front = ((0.3, 0.7, np.asarray([1, 2])), (0.5, 0.9, np.asarray([0, 1])))
    rest = dict.fromkeys(
        ("history", "evaluations", "unique_evaluations", "seconds", "policies_per_second"), 0
    )
    for policy, accuracy in (([0, 1], 0.9), ([2, 2], None)):
        found = SearchResult(
            policy=np.asarray(policy), score=-0.4, macs_ratio=0.4, validation_accuracy=0.8, pareto=front, method="agent",
            **rest,  # type: ignore[arg-type]
        )  # fmt: skip
        assert accuracy_on_front(found) == accuracy
        point = chosen_point({"macs_ratio": 0.4, "accuracy": accuracy})
        assert point[0] == 0.4 and (np.isnan(point[1]) if accuracy is None else point[1] == accuracy)
        svg = pareto_plot([(m, a) for m, a, _ in front], point, 0.5, 256)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
