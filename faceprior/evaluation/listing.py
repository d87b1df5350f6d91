"""The measures as a table: what each needs, whether it can be taken on this machine, its licence, and the way out."""

from collections.abc import Sequence

from faceprior.evaluation.measures import MEASURES, MeasureSettings, read_weights
from faceprior.tables import EMPTY, markdown_table


def listed(scorer: str = "", weights: Sequence[str] = ()) -> str:
    """Return Markdown: a table of the measures, and how to get what is missing. Nothing is downloaded, or loaded.

    scorer, weights: as of stage 7.
    """
    settings = MeasureSettings(scorer, weights=read_weights(weights))
    rows: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for measure in MEASURES:
        if measure.key in rows:  # the same in another protocol, of the face in an image
            rows[measure.key][2:4] = "both", ", ".join(measure.needs)
            continue
        reason = measure.reason(settings)
        if reason:
            reasons.setdefault(reason, []).append(measure.key)
        protocol = "both" if len(measure.protocols) > 1 else measure.protocols[0]
        needs = [*measure.needs, *(["set of images"] if measure.of == "set" else [])]
        better = f"{measure.better}, {measure.unit}" if measure.unit else measure.better
        rows[measure.key] = [measure.key, measure.title, protocol, ", ".join(needs) or EMPTY, better]
        rows[measure.key] += ["no" if reason else "yes", measure.licence]
    table = markdown_table(("key", "measure", "protocol", "needs", "better", "here", "licence"), rows.values())
    missing = "\n".join(f"- {', '.join(keys)}: {reason}" for reason, keys in reasons.items())
    return f"{table}\nHow to get the others:\n\n{missing}" if missing else table
