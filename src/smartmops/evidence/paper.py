"""What the paper printed: perplexities of its tables, one run each, Llama-7B (table 8: Phi-2). Numbers only."""

from __future__ import annotations

BASES = ("90%", "85%", "75%", "7:8", "3:4", "2:4", "4:8")  # order of the lists below, down to table 5

# Table 2, centralized: prompt tuning at the injection layer, and MoPs.
TABLE2 = {
    "dolly": {
        "prompt-tuning": (52.65, 18.16, 8.25, 70.14, 9.06, 3.67, 3.59),
        "mops": (40.34, 15.04, 7.24, 54.97, 8.08, 3.54, 3.59),
    },
    "superni": {
        "prompt-tuning": (58.47, 16.50, 8.54, 67.86, 10.64, 6.01, 5.90),
        "mops": (52.86, 14.59, 7.80, 59.80, 10.05, 5.79, 5.73),
    },
}
# Table 3, federated over 100 clients.
TABLE3 = {
    "dolly": {
        "fedprompt": (98.13, 28.28, 11.99, 143.02, 17.20, 5.09, 4.91),
        "mops": (65.25, 20.77, 9.45, 84.10, 12.20, 4.23, 4.06),
    },
    "superni": {
        "fedprompt": (76.17, 18.64, 9.14, 91.64, 14.42, 6.43, 6.14),
        "mops": (66.51, 16.52, 7.88, 72.04, 12.38, 5.75, 5.65),
    },
}
# Table 5, federated over 10 clients, int8 bases.
TABLE5 = {
    "dolly": {
        "fedprompt": (146.24, 78.62, 28.95, 192.10, 50.30, 14.24, 13.13),
        "mops": (140.05, 71.25, 28.26, 166.48, 47.37, 14.51, 13.10),
    },
}
METHODS = ("prompt-tuning", "mops", "lora", "ia3")  # order of the lists below
TABLE4 = {"dense": (3.24, 3.09, 3.14, 3.11), "75%": (8.25, 6.0, 8.7, 6.2), "85%": (18.16, 12.4, 12.4, 12.4),
          "90%": (52.65, 26.6, 21.4, 26.2)}  # fmt: skip
TABLE6 = {"int8": (14.9, 8.9, 7.4, 6.6), "int8+75%": (40.3, 28.2, 14.6, 15.1), "int8+85%": (95.6, 70.9, 22.5, 26.0),
          "int8+90%": (197.7, 140.8, 39.3, 36.3)}  # fmt: skip
TABLE8 = {"lora": 37.9, "mops": 36.62, "mops over lora": 31.28}


def printed(table: str, data: str, method: str, base: str) -> float | None:
    """The paper's perplexity, or None where it has none."""
    by_base = {"table2": TABLE2, "table3": TABLE3, "table5": TABLE5}
    if table in by_base:
        row = by_base[table].get(data, {}).get(method)
        name = base.removeprefix("int8+") if table == "table5" else base
        return None if row is None or name not in BASES else row[BASES.index(name)]
    if data != "dolly":
        return None
    if table == "table8":
        return TABLE8.get(method) if base == "dense" else None
    values = {"table4": TABLE4, "table6": TABLE6}.get(table, {}).get(base)
    return None if values is None or method not in METHODS else values[METHODS.index(method)]
