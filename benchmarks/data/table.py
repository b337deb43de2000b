"""The figures of data_loading.py for a terminal."""

from typing import Any


def lay_out(result: dict[str, Any]) -> str:
    """Return one table for each case and number of workers."""
    lines: list[str] = []
    for case, found in result["cases"].items():
        if case == "resume":
            lines += resume(found)
        else:
            for workers, rows in found.items():
                lines += rates(f"{case}, workers {workers}", rows)
    return "\n".join(lines)


def rates(title: str, rows: dict[str, Any]) -> list[str]:
    lines = ["", f"{title:<24}{'samples/s':>10}{'min':>9}{'max':>9}{'CPU ms':>9}{'others':>8}   dstrain / it"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"{name:<24}  {row['error']}")
            continue
        ratio = row.get("dstrain_over_it")
        shown = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else ""
        values = f"{row['median']:>10.1f}{row['min']:>9.1f}{row['max']:>9.1f}{row['cpu_ms_a_sample']['median']:>9.3f}"
        lines.append(f"{name:<24}{values}{row['others_cores']['max']:>8.2f}   {shown}")
    return lines


def resume(loaders: dict[str, Any]) -> list[str]:
    lines = ["", f"{'resume':<12}{'part':>6}{'samples':>12}{'open s':>10}{'first s':>10}{'max':>10}{'in vain':>10}"]
    for loader, parts in loaders.items():
        for part, row in parts.items():
            if "error" in row:
                lines.append(f"{loader:<12}{part:>6}  {row['error']}")
                continue
            seconds = f"{row['open_s']['median']:>10.3f}{row['first_s']['median']:>10.3f}{row['first_s']['max']:>10.3f}"
            lines.append(f"{loader:<12}{part:>6}{row['samples']:>12}{seconds}{row['in_vain']:>10}")
    return lines
