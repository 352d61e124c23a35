"""Command lines that show how each command is used, as its help page ends with them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "quickstart": ("smartmops quickstart", "smartmops quickstart --out runs/first --steps 100 --seeds 0"),
    "compress": (
        "smartmops compress smollm2 --calibration yours.jsonl --pattern 7:8 --out models/pruned",
        "smartmops compress models/mine --nf4 --out models/four-bit",
    ),
    "train": (
        "smartmops train smollm2 --data yours.jsonl --steps 150 --batch-size 4 --out runs/mine",
        "smartmops train --config runs/mine/config.yaml --experts 9 --out runs/nine",
    ),
    "compare": (
        "smartmops compare tiny --data office --seeds 0 1 2 --out runs/office",
        "smartmops compare smollm2 --data yours.jsonl --methods mops None lora 0.002 --out runs/both",
    ),
    "federate": (
        "smartmops federate tiny --data office --clients 10 --clients-per-round 4 --rounds 5 --out runs/ten",
        "smartmops federate smollm2 --data test.jsonl --clients-data clients/ --clients-per-round 3 --out runs/real",
    ),
    "federate-keys": ("smartmops federate-keys --clients berlin paris --hosts server.example.org --out keys",),
    "federate-server": (
        "smartmops federate-server smollm2 --data held-out.jsonl --clients 2 --clients-per-round 2 --keys keys/server "
        "--out runs/server",
    ),
    "federate-client": (
        "smartmops federate-client smollm2 --data berlin.jsonl --server server.example.org:9092 --keys keys/berlin",
    ),
    "data": ("smartmops data yours.jsonl", "smartmops data yours.csv --columns response=answer --model smollm2"),
    "evaluate": (
        "smartmops evaluate runs/mine",
        "smartmops evaluate runs/mine --data other.jsonl --answers 20",
        "smartmops evaluate runs/mine --suite tasks/",
    ),
    "inspect": ('smartmops inspect runs/mine --text "Name three rivers."',),
    "generate": (
        'smartmops generate runs/mine "Name three rivers."',
        "smartmops generate runs/mine --file questions.jsonl --out answers.jsonl",
    ),
    "chat": ("smartmops chat runs/mine", "smartmops chat runs/mine --temperature 0.7"),
    "serve": ("smartmops serve runs/mine", "smartmops serve runs/mine --port 9000 --api-key-file keys.txt"),
    "report": ("smartmops report runs/mine", "smartmops report runs/mine runs/other --out both.html"),
    "reproduce": (
        "smartmops reproduce table2 --out runs/table2",
        "smartmops reproduce all --model smollm2 --budget 60 --out runs/paper",
    ),
    "bench": ("smartmops bench smollm2 --out runs/smollm2", "smartmops bench --only train_vs_lora --out runs/lora"),
    "export": (
        "smartmops export runs/mine --format kv --out exports/kv",
        "smartmops export runs/mine --format router --out exports/router",
    ),
    "push": ("smartmops push runs/mine me/my-experts --dry-run", "smartmops push runs/mine me/my-experts --private"),
    "experts": (
        "smartmops experts runs/mine list",
        "smartmops experts runs/mine add --data new.jsonl --out runs/eight",
        "smartmops experts runs/mine drop poetry --out runs/six",
        "smartmops experts runs/mine merge poetry songs --out runs/six",
        "smartmops experts runs/mine rename poetry verse --in-place",
        "smartmops experts runs/mine freeze poetry --in-place",
        "smartmops experts runs/mine calibrate --unrelated texts.txt --in-place",
    ),
    "advise": ("smartmops advise runs/mine --data new.jsonl",),
}
