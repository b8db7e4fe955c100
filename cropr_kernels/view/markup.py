"""HTML of the page, complete: pictures are in it, and nothing refers to another address."""

import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

from .comparison import Calibrated, Comparison, Cost, Photo, Setting, Viewer
from .drawing import data_uri, draw_colors, draw_tiles, picture

TOP = 5  # classes in a table
STYLE = """
.cropr { font-variant-numeric: tabular-nums; }
.cropr .pictures { display: flex; flex-wrap: wrap; gap: 12px; }
.cropr figure { flex: 1 1 200px; margin: 0; max-width: 448px; }
.cropr figure img { width: 100%; border-radius: 8px; display: block; margin: 0; }
.cropr figure img.features { image-rendering: pixelated; }
.cropr figcaption { font-size: 0.85em; padding: 4px 2px 8px; color: var(--body-text-color); }
.cropr table { border-collapse: collapse; width: 100%; font-size: 0.92em; }
.cropr caption { text-align: left; font-weight: 600; padding: 6px 0; }
.cropr table, .cropr tr, .cropr th, .cropr td { border: 0 !important; }
.cropr th, .cropr td { padding: 4px 8px; text-align: left; }
.cropr tbody tr { border-top: 1px solid var(--border-color-primary) !important; }
.cropr thead th { font-weight: 600; }
.cropr td.number { text-align: right; white-space: nowrap; }
.cropr td.share { background: linear-gradient(to right, var(--share-color) var(--share),
  transparent var(--share)); border-radius: 3px; text-align: right; white-space: nowrap; }
.cropr .scroll { overflow-x: auto; }
.cropr .counts td, .cropr .counts th { text-align: right; padding: 3px 6px; white-space: nowrap; }
.cropr .counts { table-layout: fixed; min-width: 640px; }
.cropr .counts th:first-child { text-align: left; width: 120px; }
.cropr .bars td { vertical-align: bottom; height: 64px; padding: 0 3px; }
.cropr .bar { position: relative; background: #8884; border-radius: 3px 3px 0 0; height: 60px; }
.cropr .bar span { position: absolute; bottom: 0; left: 0; right: 0; background: #f97316;
  border-radius: 3px 3px 0 0; }
.cropr .facts { display: flex; flex-wrap: wrap; gap: 8px 24px; padding: 8px 0; margin: 0; }
.cropr .facts div { display: flex; flex-direction: column-reverse; }
.cropr .facts dt { font-size: 0.8em; }
.cropr .facts dd { margin: 0; font-size: 1.25em; font-weight: 600; }
.cropr .same { color: #15803d; } .cropr .changed { color: #b91c1c; }
.dark .cropr .same { color: #4ade80; } .dark .cropr .changed { color: #fca5a5; }
[id$="-examples"] .grid-container { padding: 34px 6px 6px !important;
  gap: 6px !important; height: auto;
  grid-template-columns: repeat(auto-fill, minmax(58px, 1fr)) !important; }
[id$="-examples"] :is(.grid-wrap, .gallery-container) { height: auto !important;
  min-height: 0 !important; }
[id$="-examples"] .thumbnail-lg { aspect-ratio: 1 !important; height: auto !important; }
[id$="-examples"] .caption-label { font-size: 0.6em; padding: 0 4px; inset: auto 0 0 auto; }
.cropr .alert { border-left: 4px solid #b91c1c; padding: 8px 12px; }
.cropr td.share.unpruned { --share-color: #8885; }
.cropr td.share.pruned { --share-color: #f9731666; }
"""


def _wrapped(content: str, **attributes: str) -> str:
    text = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return f'<div class="cropr"{text}>{content}</div>'


def _figure(address: str, alternative: str, caption: str, style: str) -> str:
    return (
        f'<figure><img class="{style}" src="{address}" alt="{escape(alternative)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def alert(message: str) -> str:
    """A sentence that screen readers announce at once."""
    return _wrapped(f'<p class="alert" role="alert">{escape(message)}</p>')


def invitation() -> str:
    return _wrapped("<p>Drop a photo below, take one, or choose an example.</p>")


def describe_tiles(token_map: Tensor, block: int) -> str:
    """Count the tokens after a block, and the patches of the largest tile or those dropped."""
    sizes = token_map[token_map >= 0].bincount()
    sizes = sizes[sizes > 0]
    where = "before block 1" if block == 0 else f"after block {block}"
    if (token_map < 0).any():
        return f"{where}: {len(sizes)} of {token_map.numel()} patches are left"
    text = f"{where}: {token_map.numel()} patches in {len(sizes)} tokens"
    return f"{text}; {int((sizes == 1).sum())} hold one patch, the largest {int(sizes.max())}"


def photo_markup(viewer: Viewer, photo: Photo, comparison: Comparison, block: int) -> str:
    """A photo, its tiles after a block, and what the model answers."""
    token_map = comparison.token_maps[block]
    grid = (token_map.shape[0], token_map.shape[1])
    if photo.address is None:
        photo.address = data_uri(picture(photo.pixels))
    tiles = data_uri(draw_tiles(photo.pixels, token_map))
    figures = [
        _figure(
            photo.address, f"photo {photo.name}", f"{photo.name}, as the model takes it", "photo"
        ),
        _figure(tiles, f"tiles of {photo.name}", describe_tiles(token_map, block), "tiles"),
    ]
    for colors, state in (
        (comparison.unpruned_colors, "unpruned"),
        (comparison.pruned_colors, "pruned"),
    ):
        if colors is not None:
            figures.append(
                _figure(
                    data_uri(draw_colors(colors, grid)),
                    f"features of {photo.name}, {state}",
                    f"features, {state}: three principal components as colors",
                    "features",
                )
            )
    answer = _classes(viewer, comparison) if viewer.classifies else _features(comparison)
    return _wrapped(f'<div class="pictures">{"".join(figures)}</div>{answer}')


def _classes(viewer: Viewer, comparison: Comparison) -> str:
    rows = [""] * min(TOP, len(comparison.unpruned))
    columns = {"unpruned": comparison.unpruned, "pruned": comparison.pruned}
    for column, logits in columns.items():
        best = logits.softmax(0).topk(len(rows))
        for row, (index, share) in enumerate(zip(best.indices.tolist(), best.values.tolist())):
            rows[row] += (
                f"<td>{escape(viewer.class_name(index))}</td>"
                f'<td class="share {column}" style="--share: {100 * share:.0f}%">'
                f"{100 * share:.1f} %</td>"
            )
    same = comparison.agreement == 1
    answer = '<span class="same">same</span>' if same else '<span class="changed">changed</span>'
    facts = _facts({"best class": answer, "KL divergence": f"{comparison.divergence:.3f}"})
    head = '<th scope="col">unpruned</th><td></td><th scope="col">pruned</th><td></td>'
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"{facts}<table><caption>Best classes</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _features(comparison: Comparison) -> str:
    facts = {"cosine of the output": f"{comparison.agreement:.4f}"}
    error = comparison.feature_error
    if error is not None:
        facts["error of the features"] = f"{100 * error:.1f} %"
    return _facts(facts)


def counts_markup(comparisons: Sequence[Comparison]) -> str:
    """Tokens that enter each block, of each photo where they differ."""
    if not comparisons:
        return ""
    counts = list(dict.fromkeys(tuple(comparison.tokens) for comparison in comparisons))
    rows = "".join(
        _token_rows(tokens, f", photo {number + 1}" if len(counts) > 1 else "")
        for number, tokens in enumerate(counts)
    )
    if len(comparisons) < 2:
        note = ""
    elif len(counts) > 1:
        note = "<p>Each photo keeps as many tokens as it needs, or its size has.</p>"
    else:
        note = (
            "<p>The schedule keeps as many tokens of both photos; which patches they hold is up to "
            "each photo.</p>"
        )
    return _wrapped(_block_table("Tokens that enter each block", len(counts[0]), rows) + note)


def _block_table(caption: str, num_blocks: int, rows: str) -> str:
    head = "".join(f"<th scope='col'>{block + 1}</th>" for block in range(num_blocks))
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{caption}">'
        f'<table class="counts"><caption>{caption}</caption>'
        f"<thead><tr><th scope='col'>block</th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(head: str, cells: Sequence[str]) -> str:
    body = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr><th scope='row'>{head}</th>{body}</tr>"


def _token_rows(tokens: Sequence[int], suffix: str) -> str:
    shares = [100 * count / tokens[0] for count in tokens]
    bars = "".join(
        f'<td><div class="bar"><span style="height: {share:.0f}%"></span></div></td>'
        for share in shares
    )
    numbers = _row(f"tokens{suffix}", [str(count) for count in tokens])
    return f'<tr class="bars" aria-hidden="true"><td></td>{bars}</tr>{numbers}'


def cost_markup(setting: Setting, cost: Cost | None, device: str) -> str:
    """FLOPs and time of a forward at a setting, once measured."""
    schedule = "the model's own counts" if setting.rate is None else f"rate {setting.rate}"
    equal = ", equal counts" if setting.merge and setting.equal_counts else ""
    title = f"{schedule}, {'merging' if setting.merge else 'dropping'}{equal}"
    if cost is None:
        return _wrapped(f"<p>Measuring {title} on {escape(device)} ...</p>", role="status")
    rows = "".join(
        _row(name, [f"{count / 2e6:.0f}" for count in counts])
        for name, counts in (("pruned", cost.flops), ("unpruned", cost.unpruned_flops))
    )
    flops, unpruned_flops = (sum(counts) / 2e9 for counts in (cost.flops, cost.unpruned_flops))
    facts = {
        "times fewer FLOPs": f"{cost.flop_ratio:.2f}",
        "GFLOPs, from and to": f"{unpruned_flops:.2f} → {flops:.2f}",
        "ms a photo, from and to": f"{cost.unpruned_ms:.1f} → {cost.ms:.1f}",
        "times as fast": f"{cost.unpruned_ms / cost.ms:.2f}",
    }
    note = (
        f"At {title}, measured on {escape(device)}: one photo at a time, of average counts, median "
        f"of {cost.rounds}; batches gain more. GFLOPs and MFLOPs are multiply-adds."
    )
    table = _block_table("MFLOPs of each block", len(cost.flops), rows)
    return _wrapped(f"{table}{_facts(facts)}<p>{note}</p>", role="status")


def calibration_markup(viewer: Viewer, calibrated: Calibrated | None, queries: str) -> str:
    """A sentence on where the queries are from, and on what they are worth."""
    if calibrated is None:
        return _wrapped(f"<p>Queries: {escape(queries)}.</p>")
    photos = f"{calibrated.num_photos} photo{'s' * (calibrated.num_photos > 1)}"
    worth = ""
    if not math.isnan(calibrated.agreement):
        others = calibrated.num_photos - calibrated.num_fit
        measured = (
            f"the best class of {round(calibrated.agreement * others)} of the {others} others stays"
            if viewer.classifies
            else f"the output of the {others} others has a cosine of {calibrated.agreement:.3f}"
        )
        worth = (
            f" Calibrated on {calibrated.num_fit} of them, {measured} at rate {calibrated.rate}."
        )
    return _wrapped(
        f"<p>No queries were passed, so the page calibrated on {photos}.{worth} So few are enough "
        "to look, not to deploy: <code>cropr calibrate MODEL FOLDER</code> on a few hundred photos "
        "of yours gives better queries and measures them.</p>"
    )
