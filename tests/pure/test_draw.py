"""Pictures, pages and traces show what was simulated or measured, and need nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from parallel.pipeline.actions import PASS_OPS, Action
from parallel.pipeline.costs import Costs
from parallel.pipeline.draw_bars import Bar, Drawing, Row, Wait, bars_of, fill_of, rows_of
from parallel.pipeline.draw_html import draw_html
from parallel.pipeline.draw_svg import draw_svg
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.schedules.registry import generate, schedules
from parallel.pipeline.simulate import Timeline, simulate
from parallel.pipeline.study import Asked, study
from parallel.pipeline.trace import chrome_trace

SVG = "{http://www.w3.org/2000/svg}"
COSTS = Costs(2.0, 1.5, 1.0, 0.25)
MEASURED = [
    Bar(0, "compute runs", "0F0", 1000.0, 1001.0, details={"step": 2}),
    Bar(0, "compute waits", "wait for 0B0", 1001.0, 1003.0, details={"step": 2}),
    Bar(0, "compute runs", "0B0", 1003.0, 1005.0, details={"step": 2}),
]


def timeline(name: str = "zb-h1", ranks: int = 3, microbatches: int = 4, transfers: bool = True) -> Timeline:
    program = generate(name, ranks, microbatches, costs=COSTS)
    return simulate(pair_transfers(program, COSTS) if transfers else program, COSTS)


def page_data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


# Bars


def test_every_action_that_takes_time_is_a_bar() -> None:
    ran = timeline()
    spans = [span for listed in ran.spans for span in listed]
    bars = bars_of(ran)
    assert Counter(bar.name for bar in bars) == Counter(str(span.action) for span in spans if span.end > span.start)
    assert not any("SEND" in bar.name for bar in bars), "a send takes no time, its receive does"
    first = next(bar for bar in bars if bar.name == "1F0")
    assert (first.rank, first.lane, first.start, first.end) == (1, "compute", 2.25, 4.25)


def test_what_a_bar_waited_for() -> None:
    bars = bars_of(timeline())
    named = {bar.name: bar for bar in bars}

    def waits(name: str) -> set[str]:
        return {bars[wait.bar].name for wait in named[name].waits}

    assert waits("0F0") == set()
    assert waits("1F0") == {"1RECV_F0"}
    assert waits("1RECV_F0") == {"0F0"}, "the send between them takes no time"
    assert waits("1I0") == {"1F0", "1RECV_I0"}
    assert waits("2W3") == {"2I3"}
    assert all(bars[wait.bar].end <= bar.start for bar in bars for wait in bar.waits)
    assert Wait(bars.index(named["1F0"]), "its forward has run") in named["1I0"].waits


def test_a_row_a_lane_and_more_where_bars_overlap() -> None:
    bars = [
        Bar(0, "p2p", "0RECV_I0", 0.0, 2.0),
        Bar(0, "p2p", "0RECV_I1", 1.0, 3.0),
        Bar(0, "p2p", "0RECV_I2", 2.0, 4.0),
        Bar(1, "compute", "1F0", 0.0, 1.0),
        Bar(0, "compute", "0F0", 0.1 + 0.2, 1.0),
        Bar(0, "compute", "0F1", 0.0, 0.3),
    ]
    rows, row_of = rows_of(bars)
    assert rows == [Row(0, "compute", 0), Row(0, "p2p", 0), Row(0, "p2p", 1), Row(1, "compute", 0)]
    assert row_of == [1, 2, 1, 3, 0, 0]


@pytest.mark.parametrize("name", schedules())
def test_a_drawing_with_transfers_has_the_times_of_the_simulation(name: str) -> None:
    found = study(Asked(name, 4, 8, costs=COSTS, time_limit_seconds=2))
    plain, drawn = ({span.action: span for span in line.order} for line in (found.timeline, found.drawn))
    assert {action.op for action in drawn} > {action.op for action in plain}
    for action, span in plain.items():
        assert (drawn[action].start, drawn[action].end) == pytest.approx((span.start, span.end))


# Pictures


def test_a_picture_has_every_bar_in_its_place() -> None:
    bars = bars_of(timeline("interleaved", 2, 4))
    picture = ElementTree.fromstring(draw_svg(Drawing("a < b", bars, [("makespan", "7")])))
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "a < b" in texts
    assert "makespan 7" in texts
    rects = {}
    for rect in picture.iter(f"{SVG}rect"):
        tip = rect.find(f"{SVG}title")
        if tip is not None and tip.text is not None:
            rects[tip.text.split(":")[0]] = rect
    assert rects.keys() == {bar.name for bar in bars}
    scale = float(rects["0F0"].attrib["width"]) + 1.0  # one pixel lies between bars
    for bar in bars:
        left = float(rects[bar.name].attrib["x"]) - float(rects["0F0"].attrib["x"])
        assert left == pytest.approx(bar.start / 2.0 * scale, abs=0.5)
    heights = {name: float(rect.attrib["y"]) for name, rect in rects.items()}
    assert heights["0F0"] == heights["2F3"] < heights["1F0"]
    numbers = Counter(text.text for text in picture.iter(f"{SVG}text") if "number" in text.attrib.get("class", ""))
    assert numbers == {str(microbatch): 2 * 4 for microbatch in range(4)}, "F and B on four stages"
    styles = {name: rect.attrib["style"] for name, rect in rects.items()}
    assert styles["0F0"] == styles["1F3"]
    assert len({styles[name] for name in ("0F0", "2F0", "0B0", "2B0")}) == 4, "op and chunk can be told apart"


def test_colours_tell_ops_and_chunks_apart() -> None:
    colours = {fill_of(op, chunk, 8) for op in PASS_OPS for chunk in range(8)}
    assert len(colours) == len(PASS_OPS) * 8
    assert fill_of(None, 0, 1) not in colours


def test_measured_bars_are_drawn_alike() -> None:
    ElementTree.fromstring(draw_svg(Drawing("measured", MEASURED)))
    data = page_data(draw_html(Drawing("measured", MEASURED)))
    assert [row[1] for row in data["rows"]] == ["compute runs", "compute waits"]
    assert [row[3] for row in data["rows"]] == [True, False], "waits have less room"


def test_nothing_to_draw() -> None:
    ElementTree.fromstring(draw_svg(Drawing("nothing", [])))
    assert page_data(draw_html(Drawing("nothing", [])))["bars"] == []
    assert json.loads(chrome_trace([]))["traceEvents"] == []


# Pages


def test_a_page_holds_the_drawing() -> None:
    ran = timeline()
    bars = bars_of(ran)
    memory = [ran.memory(rank) for rank in range(3)]
    data = page_data(draw_html(Drawing("zb-h1", bars, [("makespan", "7")], memory, 3.0)))
    assert data["facts"] == [["makespan", "7"]]
    assert [bar[1:4] for bar in data["bars"]] == [[bar.name, bar.start, bar.end] for bar in bars]
    assert [data["rows"][bar[0]][0] for bar in data["bars"]] == [bar.rank for bar in bars]
    for drawn, bar in zip(data["bars"], bars, strict=True):
        assert [(other, data["reasons"][why]) for other, why in drawn[4]] == list(bar.waits)
    assert data["memory"] == [[list(step) for step in curve] for curve in memory]
    assert data["limit"] == 3.0
    assert data["fills"].keys() == {Action.parse(bar.name).op for bar in bars} == data["words"].keys()


def test_a_page_needs_nothing_else() -> None:
    page = draw_html(Drawing("zb-h1", bars_of(timeline())))
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert "{{" not in page


def test_names_cannot_break_out_of_a_page() -> None:
    page = draw_html(Drawing("</script><b>", [Bar(0, "compute", "</script><i>", 0.0, 1.0)]))
    assert "<b>" not in page
    assert "<i>" not in page
    assert page_data(page)["bars"][0][1] == "</script><i>"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_a_page_is_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.js"
    script.write_text(draw_html(Drawing("x", [])).rpartition("<script>")[2].partition("</script>")[0])
    ended = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


# Traces


def test_a_trace_has_every_bar_and_arrows_between_ranks() -> None:
    bars = bars_of(timeline())
    events = json.loads(chrome_trace(bars))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(span["pid"], span["name"]) for span in spans] == [(bar.rank, bar.name) for bar in bars]
    assert all(span["dur"] == pytest.approx((bar.end - bar.start) * 1e6) for span, bar in zip(spans, bars, strict=True))
    assert {span["tid"] for span in spans} == {"compute", "p2p"}
    leaving, arriving = ([event for event in events if event["ph"] == phase] for phase in "sf")
    crossing = sum(bars[wait.bar].rank != bar.rank for bar in bars for wait in bar.waits)
    assert len(leaving) == len(arriving) == crossing == sum("RECV" in bar.name for bar in bars)
    ends = {event["id"]: event for event in arriving}
    assert all(event["pid"] != ends[event["id"]]["pid"] and event["ts"] <= ends[event["id"]]["ts"] for event in leaving)


def test_measured_times_count_from_the_first() -> None:
    events = [event for event in json.loads(chrome_trace(MEASURED))["traceEvents"] if event["ph"] == "X"]
    assert [event["ts"] for event in events] == pytest.approx([0.0, 1e6, 3e6])
    assert events[0]["args"] == {"step": 2}
