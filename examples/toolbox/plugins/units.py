"""Conversion of units. It has never heard of miniplug."""

from typing import Dict, List

SCALES = {  # each unit in terms of the first of its kind
    "length": {"m": 1, "mm": 0.001, "cm": 0.01, "km": 1000, "in": 0.0254, "ft": 0.3048, "yd": 0.9144, "mi": 1609.344},
    "mass": {"kg": 1, "g": 0.001, "t": 1000, "oz": 0.028349523125, "lb": 0.45359237},
    "time": {"s": 1, "min": 60, "h": 3600, "d": 86400},
}


class Tool:
    def convert(self, value: float, unit: str, to: str) -> float:
        """A value in another unit of the same kind."""
        for scale in SCALES.values():
            if unit in scale and to in scale:
                return float(f"{value * scale[unit] / scale[to]:.12g}")
        raise ValueError(f"no way from {unit!r} to {to!r}")

    def known(self) -> Dict[str, List[str]]:
        """The units there are, by kind."""
        return {kind: list(scale) for kind, scale in SCALES.items()}

    def size(self, count: int) -> str:
        """A number of bytes for people to read."""
        amount, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
        while abs(amount) >= 1024 and len(units) > 1:
            amount, units = amount / 1024, units[1:]
        return f"{amount:.4g} {units[0]}"
