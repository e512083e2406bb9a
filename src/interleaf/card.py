"""The model card of an adapter: what it was trained on, its results, how to load it."""

from __future__ import annotations

from typing import Any


def model_card(config: dict[str, Any], record: dict[str, Any], size_bytes: int) -> str:
    """Write the README.md of an adapter folder, with the hub's front matter."""
    base = config.get("base_model_name_or_path") or "unknown"
    parts = [_front_matter(config, base), f"# {record['name']}\n", _about(config, record, base, size_bytes)]
    if record["metrics"]:
        parts.append(_results(record["metrics"]))
    if labels := ((record["task"] or {}).get("state") or {}).get("labels"):
        parts.append("## Labels\n\n" + ", ".join(f"`{label}`" for label in labels) + "\n")
    parts.append(_usage(record, base))
    return "\n".join(parts)


def _front_matter(config: dict[str, Any], base: str) -> str:
    lines = ["---", "library_name: peft", "tags:", "- adapter", "- interleaf", f"- {str(config['peft_type']).lower()}"]
    if "/" in base and not base.startswith(("/", ".")):
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---", ""])


def _about(config: dict[str, Any], record: dict[str, Any], base: str, size_bytes: int) -> str:
    task = record["task"] or {}
    data = record["run"].get("train")
    rows = {
        "Base": f"`{base}` ({record['base']['architecture']})",
        "Kind": str(config["peft_type"]).lower(),
        "Task": task.get("name"),
        "Trained on": f"`{data}`" if data else None,
        "Size": f"{size_bytes / 1000:,.0f} kB",
        "Base fingerprint": f"`{record['base']['weights']}`",
    }
    return "".join(f"- **{k}**: {v}\n" for k, v in rows.items() if v)


def _results(metrics: dict[str, Any]) -> str:
    numbers = [(k, v) for k, v in metrics.items() if isinstance(v, int | float)]
    table = "".join(f"| {k} | {v:.4f} |\n" for k, v in numbers)
    return f"## Results on held-out data\n\n| metric | value |\n|---|---|\n{table}"


def _usage(record: dict[str, Any], base: str) -> str:
    auto = "AutoModelForSequenceClassification" if record["task"] else "AutoModel"
    labels = len(((record["task"] or {}).get("state") or {}).get("labels") or [])
    count = f", num_labels={labels}" if labels else ""
    return f"""## How to load it

```python
import interleaf
from transformers import {auto}

model = interleaf.adapt({auto}.from_pretrained("{base}"{count}))
model.load_adapter("path/to/this/folder")
```

Or from the command line: `interleaf predict path/to/this/folder texts.txt`.
"""
