"""The tables of a record, as Markdown."""

from __future__ import annotations

from typing import Any

_PASSES = ("inference", "forward", "backward", "both")
_PARTS = {"head": "head", "pool": "masked_average_pool", "match": "cosine_match"}


def markdown(record: dict[str, Any]) -> str:
    device = record["device"]
    rates = ", ".join(
        f"{name} {rate / 1e9:.4g} {'GB/s' if name.startswith('copy') else 'GFLOP/s'}"
        for name, rate in record["rates"].items()
    )
    version = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)
    lines = [
        f"# The head on {device['name']}",
        "",
        f"{record['date']}, commit {(record['commit'] or 'unknown')}, {version}"
        + (f", driver {device['driver']}" if device.get("driver") else ""),
        f"`{record['command'].strip()}`",
        "",
        f"Measured rates: {rates}.",
        f"Load of the machine before and after: {record['load_before']}, "
        f"{record.get('load_after')}.",
        "",
        "Medians in milliseconds, in brackets the 20 % and 80 % quantiles. *inference*: forward "
        "without gradients; *both*: forward and backward; *vs*: speed-up over that baseline in "
        "*both*. The floor is every byte moved once at the rate of the largest copy, plus the "
        "products of length D at the rate of torch.mm; *in cache*, at the rate of a copy of as "
        "many bytes as the head moves. Extra memory is the peak in addition to the inputs: "
        "results, gradients and workspace.",
    ]
    for key in record["sizes"]:
        lines += ["", f"## {key}", "", record["sizes"][key]["describe"] + "."]
        lines += _called(record, key)
        lines += _replayed(record, key)
    if record["failures"]:
        lines += ["", "## Not measured", ""]
        lines += [
            f"- {f['size']} {f['backend']} {f['part']}, {f['step']}: {f['reason']}"
            for f in record["failures"]
        ]
    return "\n".join(lines)


def _called(record: dict[str, Any], key: str) -> list[str]:
    lines = []
    memory = {m["backend"]: m["extra_mib"] for m in record["memory"] if m["size"] == key}
    for part, title in _PARTS.items():
        rows = _rows(record, key, part, "called")
        if not rows:
            continue
        cuda = record["device"]["kind"] == "cuda"
        head = [
            title, "inference", "forward", "backward", "both", "vs torch", "vs torch.compile",
            "inference / floor", "both / floor",
        ]  # fmt: skip
        head += ["share of copy rate: inference, backward"] if cuda else []
        head += ["extra MiB: inference, both"] if part == "head" and memory else []
        lines += ["", _row(head), _row(["---"] + ["--:"] * (len(head) - 1))]
        for backend, by_pass in rows.items():
            ratios = by_pass.get("both", {}).get("speedup_over", {})
            cells = [backend]
            cells += [_time(by_pass.get(name)) for name in _PASSES]
            compiled = [r for n, r in ratios.items() if n.startswith("torch.compile")]
            cells.append(f"{ratios['torch']:.1f}x" if "torch" in ratios else "")
            cells.append(f"{min(compiled):.1f}x" if compiled else "")
            cells += [_floor(by_pass.get(name)) for name in ("inference", "both")]
            if cuda:
                cells.append(
                    ", ".join(
                        f"{100 * by_pass[n]['share_of_copy']:.0f} %"
                        for n in ("inference", "backward")
                        if "share_of_copy" in by_pass.get(n, {})
                    )
                )
            if part == "head" and memory:
                extra = memory.get(backend)
                cells.append(f"{extra['inference']:.1f}, {extra['both']:.1f}" if extra else "")
            lines.append(_row(cells))
        floors = {"floor": "floor_ms"} | ({} if cuda else {"floor, in cache": "floor_cached_ms"})
        for label, field in floors.items():
            floor = record["sizes"][key].get(field, {}).get(part)
            if floor:
                cells = [f"*{label}*", *(f"{floor[name]:.3g}" for name in _PASSES)]
                lines.append(_row(cells + [""] * (len(head) - len(cells))))
    return lines


def _replayed(record: dict[str, Any], key: str) -> list[str]:
    lines: list[str] = []
    for part, title in _PARTS.items():
        warm = _rows(record, key, part, "replayed")
        cold = _rows(record, key, part, "replayed cold")
        if not warm:
            continue
        head = [f"{title}, replayed", *_PASSES, *(f"{name}, cold cache" for name in _PASSES)]
        lines += ["", _row(head), _row(["---"] + ["--:"] * (len(head) - 1))]
        for backend, by_pass in warm.items():
            cells = [_time(by_pass.get(name)) for name in _PASSES]
            cells += [_time(cold.get(backend, {}).get(name)) for name in _PASSES]
            lines.append(_row([backend, *cells]))
    return lines


def _rows(
    record: dict[str, Any], key: str, part: str, how: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measurements by backend and pass."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for m in record["measurements"]:
        if (m["size"], m["part"], m["how"]) == (key, part, how):
            rows.setdefault(m["backend"], {}).setdefault(m["pass"], m)
    return rows


def _time(m: dict[str, Any] | None) -> str:
    return f"{number(m['median_ms'])} ({number(m['q20_ms'])}-{number(m['q80_ms'])})" if m else ""


def _floor(m: dict[str, Any] | None) -> str:
    return f"{m['times_floor']:.1f}" if m and "times_floor" in m else ""


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
