"""The section of docs/rates.md: photos of different sizes in one batch."""

from benchmarks.report.render import NOT_MEASURED, Sections, load, measured_on

_METHODS = {"one by one": "one by one", "list": "list", "list, merging": "R = 8"}


def image_lists() -> str:
    """Images a second over those of the padded batch."""
    measured = load("image_lists")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    low, mean, high = rows[0]["patches"]
    speeds = "; ".join(
        f"{row['model']} "
        + ", ".join(f"{method} {row['images/s'][key][0]:.2f}" for key, method in _METHODS.items())
        for row in rows
    )
    return (
        f"Images/s of a ViT-Ti over a padded batch, {rows[0]['photos']} photos of {low} to {high} "
        f"patches (mean {mean}): {speeds} ({measured_on(env)})."
    )


SECTIONS: Sections = {"image_lists": image_lists}
