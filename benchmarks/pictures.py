"""Draws latency.svg and calls.svg from what run.py has measured."""

import calls
import matplotlib
import matplotlib.pyplot as plt

OWN, STOCK, OTHER = "#c2410c", "#475569", "#94a3b8"
COLOURS = {"miniplug": OWN, "connection": STOCK}

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "miniplug", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                            "svg.fonttype": "none", "font.family": "sans-serif"})


def draw(folder, results, titles):
    draw_latency(folder / "latency.svg", results, titles)
    if results.calls:
        draw_calls(folder / "calls.svg", results)


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


def draw_calls(path, results):
    """How many times BaseManager's each call costs."""
    rows = [(title.replace("`", ""), ratio) for title, _, _, ratio, _, beside in calls.rows(results.calls) if beside == "manager"]
    titles, ratios = zip(*rows[::-1])
    figure, axes = plt.subplots(figsize=(9.5, 0.22 * len(rows) + 1), layout="constrained")
    bars = axes.barh(titles, ratios, color=OWN)
    axes.bar_label(bars, [f"{ratio:.2f} \u00d7" for ratio in ratios], padding=3)
    axes.axvline(1, color=STOCK, linewidth=1)
    axes.set_title("processor time of a call, in those of BaseManager's", loc="left")
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.margins(x=0.1, y=0.01)
    save(figure, path)


def save(figure, path):
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    plt.close(figure)
