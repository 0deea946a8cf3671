"""Draws latency.svg and scale.svg from what run.py has measured."""

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

OWN, STOCK, OTHER = "#c2410c", "#475569", "#94a3b8"
COLOURS = {"miniplug": OWN, "connection": STOCK}
SCALE = (("payloads", "bytes echoed"), ("crowds", "threads calling one plugin"), ("plugins", "plugins, called in turn"),
         ("flights", "calls in flight"))

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "miniplug", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                            "svg.fonttype": "none", "font.family": "sans-serif"})


def draw(folder, results, titles):
    draw_latency(folder / "latency.svg", results, titles)
    draw_scale(folder / "scale.svg", results, titles)


def draw_latency(path, results, titles):
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    for each, work, unit, size in ((axes[0], "greet", "µs", 1), (axes[1], "mib1", "ms", 1000)):
        found = {name: results.number(name, work, "median") for name in titles}
        names = sorted((name for name in found if found[name] is not None), key=found.get, reverse=True)
        values = [found[name] / size for name in names]
        bars = each.barh([titles[name] for name in names], values, color=[COLOURS.get(name, OTHER) for name in names])
        each.bar_label(bars, [f"{value:.3g} {unit}" for value in values], padding=3)
        each.set_title({"greet": 'a small call, greet("world")', "mib1": "1 MiB there and back"}[work], loc="left")
        each.spines["bottom"].set_visible(False)
        each.set_xticks([])
        each.margins(x=0.2)
    save(figure, path)


def draw_scale(path, results, titles):
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6), layout="constrained")
    for each, (work, label) in zip(axes.flat, SCALE):
        for name in titles:
            points = [int(key) for key in results.results[name].get(work, {}) if key.isdigit()]
            if points:
                each.plot(points, [results.number(name, work, str(point)) for point in points], "o-", markersize=4,
                          color=COLOURS.get(name, OTHER), label=titles[name])
                each.legend(frameon=False)
        each.set_xscale("log", base=2 if work in ("payloads", "crowds") else 10)
        if work == "payloads":
            each.set_yscale("log")
        else:
            each.set_ylim(bottom=0)
        each.xaxis.set_major_formatter(FuncFormatter(count))
        each.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} µs" if value < 1000 else f"{value / 1000:g} ms"))
        each.set_xlabel(label)
        each.grid(alpha=0.3)
    figure.suptitle("time per call", x=0.01, ha="left")
    save(figure, path)


def count(value, _):
    for unit, size in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{value / size:g} {unit}"
    return f"{value:,g}"


def save(figure, path):
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    plt.close(figure)
