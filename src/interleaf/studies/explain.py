"""What an adapter does inside its base, measured on data.

Where it writes and how strongly, what depends on each layer and each bottleneck unit, what the units answer to, how far
the base's representations move (linear CKA, Kornblith et al. 2019, arXiv 1905.00414), and which tokens an answer rests
on (integrated gradients, Sundararajan et al. 2017, 1703.01365).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interleaf.adapter import Adapter
from interleaf.blocks import stacks_of
from interleaf.errors import AdapterError, ConfigError, DataError
from interleaf.evaluate import Opened, open_adapter
from interleaf.slot import Slot, slots, state_of
from interleaf.tasks.rows import shortest_first

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Tensor]
SHARES = (0.1, 0.25, 0.5)
DRAWS = 3


@dataclass
class Place:
    """One adapter at one site."""

    slot: Slot
    name: str
    adapter: Adapter

    @property
    def label(self) -> str:
        """How the place is called in tables."""
        return f"{self.slot.site.stack}.{self.slot.site.layer} {self.slot.site.position}"

    @property
    def up(self) -> nn.Linear | None:
        """The map from the bottleneck back to the model's width, if the kind has one."""
        found = getattr(self.adapter, "up", None)
        return found if isinstance(found, nn.Linear) else None


@dataclass
class Subject:
    """An opened adapter, the rows it is looked at with, and where it is."""

    opened: Opened
    rows: Dataset
    batch_size: int = 32
    places: list[Place] = field(init=False)
    now: Batch = field(init=False)

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise DataError("an adapter is explained on at least two rows.")
        active = self.opened.model.active_adapters()
        every = [(slot, n, slot.adapters[n]) for slot in slots(self.opened.model) for n in active if n in slot.adapters]
        self.places = [Place(slot, name, adapter) for slot, name, adapter in every]  # type: ignore[arg-type]
        if not self.places:
            raise AdapterError("only methods of PEFT's own run here: there is nothing of theirs to look at by site.")

    def batches(self) -> Iterator[Batch]:
        """Yield the rows as the model takes them, like lengths together."""
        task, tokenizer = self.opened.task, self.opened.tokenizer
        encoded = shortest_first(task.encode(self.rows, tokenizer))
        loader = torch.utils.data.DataLoader(encoded, self.batch_size, collate_fn=task.collator(tokenizer))
        for batch in loader:
            yield {k: v.to(self.opened.model.device) for k, v in batch.items()}

    def passes(self, hooks: Sequence[Any] = ()) -> Iterator[Any]:
        """Run the model over all rows, `now` being the batch that runs; take hooks off afterwards."""
        try:
            with torch.inference_mode():
                for batch in self.batches():
                    self.now = batch
                    yield self.opened.model(**batch)
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self) -> float:
        """Return the mean loss of a row (of a batch's tokens, where the answer is a text)."""
        sums = [(float(output.loss), len(self.now["input_ids"])) for output in self.passes()]
        return sum(loss * rows for loss, rows in sums) / sum(rows for _, rows in sums)


def explain(subject: Subject, attributed: int = 4, seed: int = 0) -> dict[str, Any]:
    """Measure all that can be measured of an adapter on some rows.

    Args:
        attributed: rows whose answers are traced to their tokens; classification only.
        seed: of the units that are removed at random.

    Returns:
        by question: plain values, as JSON holds them; what the adapter's kind has no answer to is left out.
    """
    whole = subject.loss()
    found: dict[str, Any] = {"rows": len(subject.rows), "loss": whole, "writes": writes(subject)}
    found["layers"] = without_layers(subject, whole)
    found["similarity"] = similarity(subject)
    if seen := observed(subject):
        found["observed"] = seen
    if any(place.up is not None for place in subject.places):
        scored = units(subject)
        found["units"] = scored[:12]
        found["faithful"] = faithfulness(subject, scored, whole, seed)
    if attributed and hasattr(subject.opened.task, "labels") and subject.opened.task.labels:
        found["attributions"] = attributions(subject, attributed)
    return found


# ---- where it writes


def writes(subject: Subject) -> list[dict[str, Any]]:
    """Say for each place how large what the adapter adds is beside what the layer gives, and in which direction."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def hook(number: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            y = args[1].float()
            change = output.float() - y
            real = _real(subject.now["attention_mask"], y)
            sums[number][0] += float((change.norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-9))[real].sum())
            sums[number][1] += float(torch.cosine_similarity(change, y, dim=-1)[real].sum())
            sums[number][2] += int(real.sum())

        return note

    hooks = [place.adapter.register_forward_hook(hook(number)) for number, place in enumerate(subject.places)]
    for _ in subject.passes(hooks):
        pass
    return [
        {
            "place": place.label,
            "layer": place.slot.site.layer,
            "adapter": place.name,
            "ratio": sums[number][0] / sums[number][2],
            "cosine": sums[number][1] / sums[number][2],
        }
        for number, place in enumerate(subject.places)
        if number in sums
    ]


def _real(mask: Tensor, y: Tensor) -> Tensor:
    """Tell which tokens of a site's output are text, if the site sees the batch as the mask does."""
    alike = y.ndim == 3 and y.shape[:2] == mask.shape
    return mask.bool() if alike else torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device)


def observed(subject: Subject) -> list[dict[str, Any]]:
    """Return the mean of what adapters show of themselves: gates, routers, a fusion's attentions."""
    sums: dict[tuple[str, str, str], list[Tensor]] = defaultdict(list)
    with subject.opened.model.observe() as found:
        for _ in subject.passes():
            for (name, place), values in found.items():
                for what, value in values.items():
                    last = value.float().flatten(0, -2) if value.ndim > 1 else value.float().reshape(-1, 1)
                    sums[name, place, what].append(last.mean(0))
    return [
        {"adapter": name, "place": place, "what": what, "mean": torch.stack(values).mean(0).tolist()}
        for (name, place, what), values in sums.items()
    ]


# ---- what depends on it


def without_layers(subject: Subject, whole: float) -> list[dict[str, Any]]:
    """Return, for each layer, the loss when the layer runs without the adapter, and how much more that is."""
    model = subject.opened.model
    node, skipped = model.active_setup, model._running.skip_layers
    found = []
    try:
        for layer in sorted({place.slot.site.layer for place in subject.places} - skipped):
            model.set_adapter(node, skip_layers=sorted({layer} | skipped))
            loss = subject.loss()
            found.append({"layer": layer, "loss": loss, "cost": loss - whole})
    finally:
        model.set_adapter(node, skip_layers=sorted(skipped) or None)
        model.eval()
    return found


@contextlib.contextmanager
def without_units(chosen: Sequence[tuple[Place, int]]) -> Iterator[None]:
    """Take bottleneck units out, each as its place and number, for as long as the block lasts."""
    kept = {id(place.up): (place.up, place.up.weight.detach().clone()) for place, _ in chosen if place.up is not None}
    try:
        with torch.no_grad():
            for place, unit in chosen:
                if place.up is not None:
                    place.up.weight[:, unit] = 0
        yield
    finally:
        with torch.no_grad():
            for up, weight in kept.values():
                up.weight.copy_(weight)


def units(subject: Subject, examples: int = 3) -> list[dict[str, Any]]:
    """Score every bottleneck unit by what it writes, and say which tokens it answers to most, and where.

    A unit's score is the mean over tokens of its activation's size times the length of what it writes.

    Returns:
        place, unit, score, tokens, and the text around the first of these; the highest score first.
    """
    places = [place for place in subject.places if place.up is not None]
    sizes: dict[int, Tensor] = {}
    tops: dict[int, list[tuple[Tensor, ...]]] = defaultdict(list)
    counts: dict[int, int] = defaultdict(int)

    def hook(number: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            h, now = args[0].float(), subject.now
            real = _real(now["attention_mask"], h)
            kept = h[real].abs()
            sizes[number] = sizes.get(number, torch.zeros(h.shape[-1], device=h.device)) + kept.sum(0)
            counts[number] += len(kept)
            if h.shape[:-1] == now["input_ids"].shape:
                best = kept.topk(min(examples, len(kept)), dim=0)
                rows, at = (index[best.indices] for index in real.nonzero(as_tuple=True))
                tops[number].append((best.values, now["input_ids"], rows, at))

        return note

    ups = [place.up for place in places if place.up is not None]
    for _ in subject.passes([up.register_forward_pre_hook(hook(number)) for number, up in enumerate(ups)]):
        pass
    found = []
    for number, (place, up) in enumerate(zip(places, ups, strict=True)):
        scores = sizes[number] / counts[number] * up.weight.detach().float().norm(dim=0)
        for unit, score in enumerate(scores.tolist()):
            told = _answers(subject.opened.tokenizer, tops[number], unit, examples)
            found.append({"place": place.label, "number": number, "unit": unit, "score": score, **told})
    return sorted(found, key=lambda one: -one["score"])


def _answers(tokenizer: Any, tops: Sequence[tuple[Tensor, ...]], unit: int, count: int) -> dict[str, Any]:
    """Return the tokens of a unit's largest activations, and the text around the very first."""
    found = [
        (float(values[i, unit]), ids[rows[i, unit]], int(at[i, unit]))
        for values, ids, rows, at in tops
        for i in range(len(values))
    ]
    if not found:
        return {"tokens": [], "example": ""}
    found.sort(key=lambda one: -one[0])
    tokens = list(dict.fromkeys(str(tokenizer.convert_ids_to_tokens(int(ids[at]))) for _, ids, at in found))
    _, ids, at = found[0]
    around = tokenizer.decode(ids[max(0, at - 6) : at + 7], skip_special_tokens=True)
    return {"tokens": tokens[:count], "example": around}


def faithfulness(subject: Subject, scored: list[dict[str, Any]], whole: float, seed: int) -> list[dict[str, Any]]:
    """Check the units' scores: take out the highest, and as many at random, and compare what it costs.

    Returns:
        share of the units, what taking out the highest costs, and what each random draw costs.
    """
    places = [place for place in subject.places if place.up is not None]
    chooser = torch.Generator().manual_seed(seed)
    found = []
    for share in SHARES:
        count = max(1, round(share * len(scored)))
        costs = []
        draws = [torch.randperm(len(scored), generator=chooser)[:count].tolist() for _ in range(DRAWS)]
        for chosen in [list(range(count)), *draws]:
            with without_units([(places[scored[i]["number"]], scored[i]["unit"]) for i in chosen]):
                costs.append(subject.loss() - whole)
        found.append({"share": share, "units": count, "important": costs[0], "random": costs[1:]})
    return found


# ---- how far the base moves


def similarity(subject: Subject) -> list[dict[str, Any]]:
    """Return each layer's linear CKA of the rows' mean states, with the adapter and without: 1 is the same."""
    model = subject.opened.model
    layers = [(name, block) for _, blocks in stacks_of(model) for name, block in blocks]
    on = _states(subject, layers)
    with model.disable_adapter():
        off = _states(subject, layers)
    return [{"layer": name, "cka": cka(on[name], off[name])} for name, _ in layers if name in on]


def _states(subject: Subject, layers: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Return each layer's output, the mean of a row's tokens, shape [N, D]."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            y = state_of(output).float()
            if y.ndim == 3 and len(y) == len(subject.now["input_ids"]):
                real = _real(subject.now["attention_mask"], y).unsqueeze(-1)
                found[name].append(((y * real).sum(1) / real.sum(1)).cpu())

        return note

    for _ in subject.passes([layer.register_forward_hook(hook(name)) for name, layer in layers]):
        pass
    return {name: torch.cat(parts) for name, parts in found.items()}


def cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of two sets of states, each of shape [N, D]."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(y.T @ x) ** 2 / own.clamp_min(1e-30))


# ---- which tokens an answer rests on


def attributions(subject: Subject, count: int, steps: int = 24) -> list[dict[str, Any]]:
    """Trace the answers to some rows, evenly spread, to their tokens by integrated gradients against padding.

    Raises:
        ConfigError: captum is not installed.
    """
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as error:
        raise ConfigError("token attributions need captum. Run: pip install 'interleaf[explain]'") from error
    model, tokenizer = subject.opened.model, subject.opened.tokenizer
    labels = subject.opened.task.labels or []
    traced = LayerIntegratedGradients(
        lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits, model.get_input_embeddings()
    )
    encoded = subject.opened.task.encode(subject.rows, tokenizer)
    found = []
    for number in [i * len(encoded) // count for i in range(min(count, len(encoded)))]:
        ids = torch.tensor([encoded[number]["input_ids"]], device=model.device)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            answer = int(model(input_ids=ids, attention_mask=mask).logits.argmax())
        blank = torch.full_like(ids, tokenizer.pad_token_id or 0)
        given = traced.attribute(ids, blank, target=answer, additional_forward_args=(mask,), n_steps=steps)
        tokens = tokenizer.convert_ids_to_tokens(ids[0])
        scores = given.sum(-1)[0].tolist()
        found.append({"answer": labels[answer], "tokens": [list(pair) for pair in zip(tokens, scores, strict=True)]})
    return found


# ---- two adapters


def compare_two(one: str, other: str, rows: Subject) -> dict[str, Any]:
    """Say how alike two stored adapters of one base are, and what each does to the first one's loss beside it.

    Overlap: of the directions that one writes in, the share that lies in the other's, by place; what two random
    subspaces would share stands beside it.

    Args:
        one: the folder of the adapter that `rows` opened.
        other: the folder of another adapter.
    """
    second = {(s.slot.site.write): s for s in Subject(open_adapter(other), rows.rows).places}
    overlaps = []
    for place in rows.places:
        twin = second.get(place.slot.site.write)
        if twin is None or place.up is None or twin.up is None:
            continue
        a, b = (torch.linalg.qr(up.weight.detach().float()).Q for up in (place.up, twin.up))
        cosines = torch.linalg.svdvals(a.T @ b)
        chance = max(a.shape[1], b.shape[1]) / a.shape[0]
        overlaps.append({"place": place.label, "overlap": float((cosines**2).mean()), "chance": chance})
    losses = {"alone": rows.loss()}
    for word in ("stack", "average"):
        both = open_adapter(f"{word}({other}, {one})")
        losses[word] = Subject(both, rows.rows, rows.batch_size).loss()
    return {"other": other, "overlap": overlaps, "loss": losses}
