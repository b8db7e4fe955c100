"""The sections of docs/deployment.md: what runs fastest on a CPU, and quantised files."""

from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Table,
    link,
    load,
    measured_on,
    unique,
    where,
)

MODEL, RATE = "vit_small_patch16_224", 8


def exported() -> Table | None:
    """Every runtime, model, rate and batch."""
    measured = load("exported")
    if measured is None:
        return None
    columns = [
        *("model", "rate", "merge", "batch", "runtime", "unpruned_ms", "pruned_ms", "speedup"),
        *("flop_ratio", "share", "over_eager", "spread", "difference"),
    ]
    return Table(columns, [[str(row[name]) for name in columns] for row in measured[1]])


def runtimes() -> str:
    """A ViT-S, merging: speed over unpruned eager PyTorch, and the speed-up by pruning."""
    measured, table = load("exported"), exported()
    if measured is None or table is None:
        return NOT_MEASURED
    rows = where(measured[1], model=MODEL, rate=RATE, merge=True)
    batches = unique(rows, "batch")
    body: list[list[Cell]] = []
    for runtime in unique(rows, "runtime"):
        line: list[Cell] = [runtime]
        for batch in batches:
            row = next(iter(where(rows, runtime=runtime, batch=batch)), None)
            if row is None:
                line.append("-")
                continue
            unpruned = row["over_eager"] / row["speedup"]
            line.append(f"{unpruned:.2f}, {row['over_eager']:.2f}, {row['speedup']:.2f}")
        body.append(line)
    head = ["runtime", *(f"batch {batch}" for batch in batches)]
    ratio = rows[0]["flop_ratio"]
    return (
        f"{Table(head, body).markdown()}\n\nSpeed over unpruned eager PyTorch: unpruned, pruned, "
        f"and their ratio (FLOPs: {ratio:.2f}); ViT-S, merging, R = {RATE}. "
        f"{measured_on(measured[0])}. "
        f"All cells: {link('exported', table)}."
    )


def quantized_table() -> Table | None:
    """Agreement and speed of int8 files, dropping and merging."""
    measured = load("quantized")
    if measured is None:
        return None
    columns = list(measured[1][0])
    return Table(columns, [[str(row[name]) for name in columns] for row in measured[1]])


def quantized() -> str:
    """Merging with int8 in a sentence for each way."""
    measured, table = load("quantized"), quantized_table()
    if measured is None or table is None:
        return NOT_MEASURED
    environment, rows = measured
    ways = [
        f"{row['way']}: {row['agreement_int8']:.1f} ({row['agreement_float32']:.1f}), "
        f"{row['speedup_quantization']:.2f}, {row['speedup_int8']:.2f}"
        for row in where(rows, merge=True)
    ]
    return (
        f"**int8**, {link('quantized', table)}: agreement in % with the unpruned int8 file (in "
        f"float32), speed unpruned and pruned over float32; ViT-Ti, merging, R = "
        f"{rows[0]['rate']}, {environment['photos']} photos. {'; '.join(ways)}."
    )


FILES: Files = {"exported": exported, "quantized": quantized_table}
SECTIONS: Sections = {"runtimes": runtimes, "quantized": quantized}
