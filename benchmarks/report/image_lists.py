"""The section of docs/rates.md: photos of different sizes in one batch."""

from benchmarks.report.render import NOT_MEASURED, Cell, Sections, Table, load, measured_on

_METHODS = ("one by one", "list", "list, merging")


def image_lists() -> str:
    """Images a second over those of the padded batch."""
    measured = load("image_lists")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    body: list[list[Cell]] = []
    for row in rows:
        ratios = [row["images/s"][method] for method in _METHODS]
        body.append([row["model"], *(f"{ratio[0]:.2f}x" for ratio in ratios)])
    table = Table(["ViT-Ti", "one by one", "list", "list, R = 8"], body)
    low, mean, high = rows[0]["patches"]
    return (
        f"{table.markdown()}\n\n*Images/s over a padded batch, {rows[0]['photos']} photos of {low} "
        f"to {high} patches (mean {mean}), {measured_on(env)}.*"
    )


SECTIONS: Sections = {"image_lists": image_lists}
