"""What `explain` found, as a page for people who did not train the adapter."""

from __future__ import annotations

from typing import Any

from interleaf.report import figures
from interleaf.report.blocks import Figure, RunReport, Section, Table, number
from interleaf.report.figures import Bar


def page(path: str, data: str, found: dict[str, Any]) -> RunReport:
    """Tell in sections what was found; each begins with how to read it."""
    sections = [
        _writes(found["writes"]),
        _layers(found["layers"]),
        _similarity(found["similarity"]),
        _observed(found.get("observed")),
        _units(found.get("units"), found.get("faithful")),
        _attributions(found.get("attributions")),
        _two(found.get("two")),
    ]
    overview = {"data": data, "rows": f"{found['rows']:,}", "loss": number(found["loss"])}
    return RunReport(f"What {path} does", path, overview, found, [s for s in sections if s is not None])


def _writes(rows: list[dict[str, Any]]) -> Section:
    text = (
        "An adapter adds something to what a layer gives. The ratio says how large that is beside it: 0 is nothing, "
        "1 as much as the layer itself. The cosine says in which direction: near 1 it strengthens what is there, "
        "near -1 it takes away, near 0 it adds something new."
    )
    bars = _bars("How strongly it writes", [(row["place"], row["ratio"]) for row in rows], "Longer writes more.")
    cells = [[row["place"], row["adapter"], number(row["ratio"]), number(row["cosine"])] for row in rows]
    return Section("Where it writes", text, [bars, Table(["place", "adapter", "ratio", "cosine"], cells)])


def _layers(rows: list[dict[str, Any]]) -> Section:
    text = (
        "Each layer in turn runs without the adapter. Cost is how much the loss grows: what costs much is needed, "
        "what costs nothing could be left out, and below 0 the answers are better without it."
    )
    bars = _bars("What a layer is worth", [(f"layer {r['layer']}", r["cost"]) for r in rows], "Longer is needed more.")
    cells = [[str(row["layer"]), number(row["loss"]), f"{row['cost']:+.4f}"] for row in rows]
    return Section("What depends on it", text, [bars, Table(["layer without it", "loss", "cost"], cells)])


def _similarity(rows: list[dict[str, Any]]) -> Section:
    text = (
        "How alike the model sees the rows with the adapter and without (linear CKA): 1 is alike. Layers below the "
        "lowest adapter are alike by construction."
    )
    cells = [[row["layer"], f"{row['cka']:.4f}"] for row in rows]
    return Section("How far the base moves", text, [Table(["layer", "CKA"], cells)])


def _observed(rows: list[dict[str, Any]] | None) -> Section | None:
    if not rows:
        return None
    cells = [[r["adapter"], r["place"], r["what"], ", ".join(number(v) for v in r["mean"][:12])] for r in rows]
    text = "What the adapter decides by itself, on average: gates (0 shut, 1 open), routers, the shares of a fusion."
    return Section("Gates and weights", text, [Table(["adapter", "place", "what", "mean"], cells)])


def _units(units: list[dict[str, Any]] | None, faithful: list[dict[str, Any]] | None) -> Section | None:
    if not units or not faithful:
        return None
    text = (
        "The bottleneck's units, those that write most first, with the tokens that they answer to most, and the text "
        "around the first of these. Whether the order means anything is checked: taking out the first ones should "
        "cost more than as many at random."
    )
    cells = [[u["place"], str(u["unit"]), number(u["score"]), "  ".join(u["tokens"]), u["example"]] for u in units]
    checks = [
        [f"{f['share']:.0%} ({f['units']})", f"{f['important']:+.4f}", ", ".join(f"{c:+.4f}" for c in f["random"])]
        for f in faithful
    ]
    return Section(
        "What its units answer to",
        text,
        [
            Table(["place", "unit", "score", "tokens", "example"], cells),
            Table(["units taken out", "cost of the first ones", "cost at random"], checks),
        ],
    )


def _attributions(rows: list[dict[str, Any]] | None) -> Section | None:
    if not rows:
        return None
    text = "For some rows: the tokens that speak most for the answer (+) and against it (-), by integrated gradients."
    cells = []
    for row in rows:
        ranked = sorted(row["tokens"], key=lambda pair: -abs(pair[1]))[:8]
        cells.append([row["answer"], "  ".join(f"{token} {score:+.2f}" for token, score in ranked)])
    return Section("Which tokens an answer rests on", text, [Table(["answer", "tokens"], cells)])


def _two(two: dict[str, Any] | None) -> Section | None:
    if two is None:
        return None
    text = (
        f"Beside {two['other']}. Overlap is the share of directions that both write in, with what chance would give; "
        "the loss is the first adapter's task, alone and together with the other."
    )
    overlap = [[r["place"], number(r["overlap"]), number(r["chance"])] for r in two["overlap"]]
    losses = [[name, number(loss)] for name, loss in two["loss"].items()]
    return Section(
        "Two adapters",
        text,
        [Table(["place", "overlap", "by chance"], overlap), Table(["together as", "loss"], losses)],
    )


def _bars(title: str, values: list[tuple[str, float]], reading: str) -> Figure:
    return figures.bars(title, [Bar(name, value, float("nan"), number(value)) for name, value in values], reading)
